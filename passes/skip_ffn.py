"""y = x + f(x) -> y = x + where(m, f(x), 0) while decoding: tokens with a saturated stream skip feed-forward parts.

FFN-SkipLLM (Jaiswal et al., 2024): once cos(x, x + f(x)) reaches a threshold, the feed-forward parts of the layers
after it are skipped for that token, up to the last layers; attention always runs, so caches are complete. A part that
every row of a batch skips is not run, and its weights are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sylvester.compiler.calibration import Sample
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer, find_layers
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.stages import DECODE, KEY, Stage, remember
from sylvester.passes import skip_curve
from sylvester.passes.depth import Depth, edited, require_phase
from sylvester.passes.options import require_count, require_fraction
from sylvester.passes.similarity import mean_cosines
from sylvester.passes.skip_ffn_graph import Counts, insert_counts, usable

WARM = "decode_warm"
TARGET = 0.25
AUTO = -1
STAGE, STEPS, SAMPLES = "calibrate the threshold", 14, 4


@dataclass(frozen=True)
class SkipFFN(Pass):
    """Skip `target` of all feed-forward parts, or where the cosine of the streams around one reaches `threshold`.

    A target (0.25 when neither is given) is calibrated on data. The first `cold_start` and the last `cold_end` layers
    always run (-1: an eighth of all, rounded up), and everything does for the first `warmup` generated tokens. A token
    skips the rest of the layers between, as in the paper, or at most `max_run` of them before one runs again. `static`
    leaves out the same parts for every token: those whose mean cosine is highest.
    """

    name: ClassVar[str] = "skip-ffn"
    contract: ClassVar[Contract] = "lossy"
    target: float | None = None
    threshold: float | None = None
    cold_start: int = AUTO
    cold_end: int = AUTO
    warmup: int = 5
    max_run: int = 0
    static: bool = False

    def __post_init__(self) -> None:
        if self.target is not None and self.threshold is not None:
            raise ValueError(f"give either target or threshold, found {self.target} and {self.threshold}")
        if self.target is not None:
            require_fraction("target", self.target)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float, type(None))):
            raise TypeError(f"threshold is {self.threshold!r}, expected a cosine")
        for option, least in (("cold_start", AUTO), ("cold_end", AUTO), ("warmup", 0), ("max_run", 0)):
            require_count(option, getattr(self, option), least)
        if not isinstance(self.static, bool):
            raise TypeError(f"static is {self.static!r}, expected True or False")
        if self.static and self.threshold is not None:
            raise ValueError("a static choice has a target, no threshold")

    def requires(self, program: Program) -> None:
        require_phase(program, "decode")
        if KEY in program.info:
            raise CompileError("decoding has stages already", hint="use skip-ffn once, and not with depth-schedule")
        if self.threshold is None and not (program.calibration and program.calibration.fit):
            hint = "compile(..., calibration=texts), or give a threshold"
            raise CompileError("a target is calibrated on data, found none", hint=hint)
        layers = find_layers(program)
        if len(self._region(layers)) < 2:
            raise CompileError(
                f"no feed-forward part can be skipped: of {len(layers)} layers {self._cold(layers)} are cold",
                hint="give a smaller cold_start and cold_end; at least two layers must lie between them",
            )

    def run(self, program: Program) -> Changes:
        before = program.clone()
        layers, changes = find_layers(program), Changes()
        region = self._region(layers)
        if self.static:
            return self._statically(program, layers, region)
        gates = usable(region, changes)
        warm = program.entries[DECODE].clone()
        threshold = 1.0 if self.threshold is None else float(self.threshold)
        counts = insert_counts(program.entries[DECODE], gates, threshold, self.max_run or len(layers))
        samples = program.calibration.fit[:SAMPLES] if program.calibration else ()
        if self.threshold is None:
            tried = self._calibrate(program, counts, samples, len(layers), changes)
            skip_curve.record(changes, before, _variants(program, counts, tried))
        _record(program, counts, samples, len(layers), changes)
        if self.warmup:
            program.entries[WARM] = warm
            remember(program.info, [Stage(WARM), Stage(DECODE, generated=self.warmup)])
        return changes

    def _cold(self, layers: Sequence[Layer]) -> tuple[int, int]:
        """How many layers run always at both ends."""
        automatic = -(-len(layers) // 8)
        start, end = (automatic if n == AUTO else n for n in (self.cold_start, self.cold_end))
        return start, end

    def _region(self, layers: Sequence[Layer]) -> list[Layer]:
        start, end = self._cold(layers)
        return [layer for layer in layers[start : len(layers) - end] if layer.main.of_kind("ffn")]

    def _require_reachable(self, region: int, layers: int) -> None:
        """One part of the region always runs: what it does to the stream is what is measured."""
        rests = region if self.static else region - -(-region // (self.max_run + 1)) if self.max_run else region - 1
        most = rests / layers
        wanted = TARGET if self.target is None else self.target
        if wanted > most:
            raise CompileError(
                f"target={wanted:g} is not reachable: of {layers} feed-forward parts at most {most:.3g} can be skipped",
                hint="give less, or a smaller cold_start and cold_end",
            )

    def _calibrate(
        self, program: Program, counts: Counts, samples: Sequence[Sample], layers: int, changes: Changes
    ) -> dict[float, float]:
        """The threshold that skips the wanted share of all parts, by bisection; share -> threshold tried, up to it."""
        wanted = TARGET if self.target is None else self.target
        self._require_reachable(len(counts.gates), layers)
        low, high, tried = -1.0, 1.0, dict[float, float]()
        for step in range(STEPS):
            report(STAGE, step, STEPS)
            middle = (low + high) / 2
            counts.set_threshold(middle)
            share = sum(counts.shares(program, samples)) / layers
            tried[share] = middle
            low, high = (middle, high) if share > wanted else (low, middle)
        counts.set_threshold(high)
        changes.note(f"threshold {high:.6f} for a target of {wanted:g}")
        return {share: threshold for share, threshold in tried.items() if 0 < share <= wanted} | {wanted: high}

    def _statically(self, program: Program, layers: Sequence[Layer], region: Sequence[Layer]) -> Changes:
        """The parts of the region that turn the stream least are left out of `decode`."""
        wanted = TARGET if self.target is None else self.target
        self._require_reachable(len(region), len(layers))
        streams = [(s.start, s.end) for layer in region for _, s in layer.main.of_kind("ffn")]
        cosines = mean_cosines(program, streams)
        order = sorted(range(len(region)), key=lambda n: (-cosines[n], n))
        left_out = [region[n] for n in sorted(order[: max(1, round(wanted * len(layers)))])]

        def drop(depth: Depth) -> None:
            for layer in left_out:
                depth.drop_part(layer, "ffn")

        changes = edited(program, layers, "decode", drop)
        for layer, cosine in zip(region, cosines, strict=True):
            changes.figure(layer.path, "cosine around the FFN", cosine)
        return changes


def _variants(program: Program, counts: Counts, tried: Mapping[float, float]) -> Iterator[tuple[float, Program]]:
    """The program at some of the thresholds that were tried, the last one chosen at the end."""
    shares = sorted(tried)
    for share in [shares[n - 1] for n in skip_curve.parts(len(shares))]:
        counts.set_threshold(tried[share])
        yield share, program


def _record(program: Program, counts: Counts, samples: Sequence[Sample], layers: int, changes: Changes) -> None:
    """What each layer skips on calibration data."""
    shares = counts.shares(program, samples) if samples else [math.nan] * len(counts.gates)
    for gate, share in zip(counts.gates, shares, strict=True):
        changes.apply("ffn", gate.layer.path)
        if samples:
            changes.figure(gate.layer.path, "share of tokens that skip the FFN", share)
            changes.became(gate.layer.path, "ffn", f"skipped by {share:.0%}")
    if samples:
        changes.note(f"{sum(shares) / layers:.1%} of all feed-forward parts are skipped on calibration data")
