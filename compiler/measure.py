"""What a lossy pass changed: outputs before and after on the example inputs, and for language models the next token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sylvester.compiler.check import Results, relative_error
from sylvester.compiler.program import Program, binding
from sylvester.compiler.quality import kl_rows

TINY = 1e-30


@dataclass(frozen=True)
class NextToken:
    """How often the likeliest token stays the same, and the mean KL(before || after) in nats, over `positions`."""

    agreement: float
    kl: float
    positions: int


@dataclass(frozen=True)
class Measured:
    """One float output. `error` is |after - before| / |before| in the Euclidean norm, `largest` in the maximum norm.

    `made_up`: the entry read caches that were filled with random numbers.
    """

    entry: str
    output: str
    error: float
    largest: float
    made_up: bool = False
    next_token: NextToken | None = None

    def __str__(self) -> str:
        given = "the example inputs and random caches" if self.made_up else "the example inputs"
        text = f"on {given} {self.entry}.{self.output} moved by {self.error:.1e} (relative, Euclidean)"
        if self.next_token is None:
            return text
        token = self.next_token
        agreed = f"top-1 agreement {token.agreement:.1%}, KL {token.kl:.1e} nats"
        return f"{text}; {agreed} over {token.positions} positions"


def measure(program: Program, before: Results, after: Results) -> tuple[Measured, ...]:
    """Float outputs of the main entry, and of entries that read caches; others compute parts of the same."""
    main = {binding(n).key for n in program.main.placeholders("input")}
    found: list[Measured] = []
    for name, entry in program.entries.items():
        made_up = bool({binding(n).key for n in entry.placeholders("input")} - main)
        comparable = name in before and name in after and not (made_up and _slots_differ(before[name], after[name]))
        if (entry is program.main or made_up) and comparable:
            found += _outputs(program, name, before[name], after[name], made_up)
    return tuple(found)


def _slots_differ(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Random caches of another number of layers hold other numbers."""
    return before.keys() != after.keys()


def _outputs(
    program: Program, name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], made_up: bool
) -> Iterator[Measured]:
    outputs = [o.name for o in program.entries[name].outputs if o.kind == "output" and o.name in before]
    logits = None if made_up else _logits(program, outputs)
    for output in outputs:
        old, new = before[output], after[output]
        if old.is_floating_point() and old.shape == new.shape:
            token = _next_token(old, new) if output == logits else None
            yield Measured(name, output, _distance(old, new), relative_error(old, new), made_up, token)


def _logits(program: Program, outputs: list[str]) -> str | None:
    """The name of the scores of the next token, for causal language models."""
    if "prefill" not in program.entries and program.info.get("kind") != "causal-lm":
        return None
    return "logits" if "logits" in outputs else next(iter(outputs), None)


def _distance(before: Tensor, after: Tensor) -> float:
    """Over the places where both are finite; infinite where the others differ."""
    finite = before.isfinite() & after.isfinite()
    if not torch.allclose(before[~finite], after[~finite], equal_nan=True):
        return math.inf
    before, after = before[finite].double(), after[finite].double()
    return float((after - before).norm() / before.norm().clamp_min(TINY))


def _next_token(before: Tensor, after: Tensor) -> NextToken:
    before, after = (t.flatten(0, -2) for t in (before, after))
    agreement = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    return NextToken(agreement, float(kl_rows(before, after).mean()), len(before))
