"""Size, time and quality of a program over the passes that were asked for: after each of them, beside the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""A row of the ledger as in report.json."""
START = "start"
EXPLAINED = (
    "weights are the stored bytes, each tensor once; run ms is what plain PyTorch took for the examples of every "
    "entry, measured once, and not the time on the target"
)


@dataclass(frozen=True)
class Total:
    """Where the program stood after `step`.

    `size` is stored bytes of weights. `seconds` is the time of plain PyTorch for the examples of every entry, None
    where they were not run. `loss` is what all passes so far lost against float: KL in nats of a language model, else
    the largest relative error of an output; None without calibration data.
    """

    step: str
    size: int
    seconds: float | None = None
    loss: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Totals:
    """The start and every pass in order; `measure` says what the losses are, `data` on which samples."""

    steps: tuple[Total, ...]
    measure: str = ""
    data: str = ""

    @staticmethod
    def of(rows: Sequence[Row]) -> Totals:
        """Held-out data where there is some; an exact pass loses nothing."""
        if not rows:
            return Totals(())
        found = [judged for row in rows for judged in row.get("quality", ())]
        data = found[-1]["data"] if found else ""
        first = next((judged for judged in found if judged["data"] == data), None)
        scores = first and first.get("quality")
        start = Total(
            START,
            rows[0]["before"]["parameter_bytes"],
            next((row["runs"][0] for row in rows if row.get("runs")), None),
            0.0 if first else None,
            scores["perplexity_before"] if scores else None,
        )
        steps = [start]
        for row in rows:
            steps.append(_after(row, steps[-1], data))
        measure = "" if first is None else "KL nats" if scores else "error"
        return Totals(tuple(steps), measure, data)

    def table(self) -> list[list[object]]:
        """Headings and one line per step: each number, what this pass added to it, and its ratio to the start."""
        columns = [_column([s.size / 1e6 for s in self.steps], "weights MB", ratio=True)]
        times = [None if s.seconds is None else 1e3 * s.seconds for s in self.steps]
        if any(t is not None for t in times):
            columns.append(_column(times, "run ms", ratio=True))
        if self.measure:
            columns.append(_column([s.loss for s in self.steps], f"{self.measure} ({self.data})", ratio=False))
        if any(s.perplexity is not None for s in self.steps):
            columns.append(_column([s.perplexity for s in self.steps], f"perplexity ({self.data})", ratio=True))
        names = ["after", *(s.step for s in self.steps)]
        return [[name, *(cell for column in columns for cell in column[i])] for i, name in enumerate(names)]


def _after(row: Row, before: Total, data: str) -> Total:
    judged = next((j for j in row.get("quality", ()) if j["data"] == data), None)
    runs = row.get("runs")
    return Total(
        row["pass"],
        row["after"]["parameter_bytes"],
        runs[1] if runs else None,
        before.loss if judged is None else _loss(judged),
        before.perplexity if judged is None or not judged.get("quality") else judged["quality"]["perplexity"],
    )


def _loss(judged: Row) -> float | None:
    if judged.get("quality"):
        return float(judged["quality"]["kl"])
    return max((float(drift["error"]) for drift in judged.get("drifts", ())), default=None)


def _column(values: Sequence[float | None], name: str, ratio: bool) -> list[list[object]]:
    """A number with what this pass added, and its ratio to the start; an empty text where it is not known."""
    start = values[0]
    lines: list[list[object]] = [[name, "this pass", *(["x start"] if ratio else [])]]
    for before, now in zip([None, *values], values, strict=False):
        added = "" if now is None or before is None else now - before
        share = [now / start if now is not None and start else ""] if ratio else []
        lines.append(["" if now is None else now, added, *share])
    return lines
