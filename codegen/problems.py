"""The tuning problems of a lowered entry, and how often a call runs each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sylvester.codegen.index import Index, Size, index
from sylvester.codegen.lazy import Extern, Linear, Plan
from sylvester.codegen.space import PREFILL_ROWS, Problem, row_class
from sylvester.codegen.tunable import family

DECODE_KEYS = 256
"""Keys that one token of a `decode` entry looks at, whatever the caches hold."""


def problems_of(plan: Plan, hints: Mapping[Size, int]) -> Counter[Problem]:
    """Linear layers by row class, those side by side as one with all their columns; and attention.

    Open sizes: an entry `decode` is one sequence, an entry `prefill` one of PREFILL_ROWS tokens; else the example
    decides.
    """
    assumed = {"decode": 1, "prefill": PREFILL_ROWS}.get(plan.name)
    found = [_problem(step, hints, assumed) for step in plan.steps if isinstance(step, (Linear, Extern))]
    return Counter(problem for problem in found if problem is not None and family(problem) is not None)


def _problem(step: Linear | Extern, hints: Mapping[Size, int], assumed: int | None) -> Problem | None:
    if isinstance(step, Linear):
        n, k = _value(step.n, hints) * len(step.outputs), _value(step.k, hints)
        return Problem.linear(str(step.format), _tokens(step.m, hints, assumed), n, k)
    if step.problem is None:
        return None
    name, form, (queries, keys, heads, kv_heads, width) = step.problem
    rows = row_class(_tokens(queries, hints, assumed))
    seen = {None: _value(keys, hints), 1: DECODE_KEYS}.get(assumed, rows)
    batch = hints if assumed is None else dict.fromkeys(hints, 1)
    form = form if rows > 1 else form.replace("causal", "full")
    return Problem(name, form, (rows, seen, _value(heads, batch), _value(kv_heads, batch), _value(width, hints)))


def _tokens(m: Index, hints: Mapping[Size, int], assumed: int | None) -> int:
    """Rows of a kernel; a `decode` entry has one sequence, so only constants count."""
    if m.constant is not None or assumed is None:
        return _value(m, hints)
    return _value(m, dict.fromkeys(hints, 1)) if assumed == 1 else assumed


def _value(n: Index, sizes: Mapping[Size, int]) -> int:
    return n.substitute({size: index(value) for size, value in sizes.items()}).constant or 1
