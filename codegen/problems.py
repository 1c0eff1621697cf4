"""The tuning problems of a lowered entry, and how often a call runs each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sylvester.codegen.index import Index, Size, index
from sylvester.codegen.lazy import Extern, Linear, Plan
from sylvester.codegen.space import PREFILL_ROWS, Problem, row_class
from sylvester.codegen.tunable import family

BEGIN, DECODE = ("prefill", "start"), "decode"
DECODE_KEYS = 256
"""Keys that one token of an entry `decode` looks at, whatever the caches hold."""


def problems_of(plan: Plan, hints: Mapping[Size, int]) -> Counter[Problem]:
    """Linear layers by row class, those side by side as one with all their columns; and attention.

    Open sizes: an entry `decode` is one sequence, the entries that begin one take PREFILL_ROWS tokens of it; elsewhere
    the example decides.
    """
    sizes = _sizes(plan, hints)
    found = [_problem(plan.name, step, sizes) for step in plan.steps if isinstance(step, (Linear, Extern))]
    return Counter(problem for problem in found if problem is not None and family(problem) is not None)


def worth_tuning(problems: Mapping[str, Counter[Problem]]) -> dict[str, Counter[Problem]]:
    """Without the entry `prefill` where `start` reads prompts: what it adds is the logits of every token."""
    return {name: found for name, found in problems.items() if name != BEGIN[0] or BEGIN[1] not in problems}


def _sizes(plan: Plan, hints: Mapping[Size, int]) -> dict[Size, int]:
    if plan.name not in (*BEGIN, DECODE):
        return dict(hints)
    batch = {a for buffer in plan.of_kind("input") if buffer.shape for a in buffer.shape[0].atoms}
    return {size: 1 if plan.name == DECODE or size in batch else PREFILL_ROWS for size in hints}


def _problem(entry: str, step: Linear | Extern, sizes: Mapping[Size, int]) -> Problem | None:
    if isinstance(step, Linear):
        n, k = _value(step.n, sizes) * len(step.outputs), _value(step.k, sizes)
        return Problem.linear(str(step.format.stored), _value(step.m, sizes) * step.format.records, n, k)
    if step.problem is None:
        return None
    name, form, shape = step.problem
    queries, keys, heads, kv_heads, width = (_value(n, sizes) for n in shape)
    rows = row_class(queries)
    seen = DECODE_KEYS if entry == DECODE else rows if entry in BEGIN else keys
    form = form if rows > 1 else form.replace("causal", "full")
    return Problem(name, form, (rows, seen, heads, kv_heads, width))


def _value(n: Index, sizes: Mapping[Size, int]) -> int:
    return n.substitute({size: index(value) for size, value in sizes.items()}).constant or 1
