"""Quality against the share that is skipped: KL from the program before, on a little of the calibration data."""

from __future__ import annotations

from collections.abc import Iterable

from sylvester.compiler import quality
from sylvester.compiler.changes import Changes
from sylvester.compiler.next_token import language_model
from sylvester.compiler.program import Program

NAME = "KL at skip ratio"
POINTS, SAMPLES = 4, 2


def parts(count: int) -> list[int]:
    """Up to `POINTS` numbers from 1 to `count`, evenly spread, `count` among them."""
    return sorted({-(-count * n // POINTS) for n in range(1, POINTS + 1)} - {0})


def record(changes: Changes, before: Program, variants: Iterable[tuple[float, Program]]) -> None:
    """One figure per variant (the share it skips, the program); none without data or for what is no language model."""
    samples = before.calibration.fit[:SAMPLES] if before.calibration else ()
    if not samples or language_model(before) is None:
        return
    for share, program in variants:
        changes.figure(f"{share:.3f}", NAME, quality.compare(before, program, samples).kl)
