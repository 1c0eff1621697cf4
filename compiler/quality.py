"""What lossy passes cost: perplexity, KL and agreement with the float program, or the error of every output.

Samples run one by one, and the float program again for each comparison: memory is that of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.calibration import Calibration, Sample
from sylvester.compiler.errors import CompileError
from sylvester.compiler.next_token import LanguageModel, language_model, predictions, run
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report

ROWS = 64
"""Rows of scores that are widened to float64 at a time."""
TINY = 1e-300
FIT, HELD = "calibration", "held-out"


@dataclass(frozen=True)
class Quality:
    """A language model beside the one it was made from, over `positions` predicted tokens.

    Perplexity is exp(mean -log p(next token)), `kl` the mean KL(before || after) in nats, `agreement` how often the
    likeliest token is the same.
    """

    perplexity_before: float
    perplexity: float
    kl: float
    agreement: float
    positions: int

    def __str__(self) -> str:
        change = self.perplexity / self.perplexity_before - 1
        return (
            f"perplexity {self.perplexity_before:.4g} -> {self.perplexity:.4g} ({change:+.2%}), "
            f"KL {self.kl:.1e} nats, top-1 agreement {self.agreement:.1%} over {self.positions} positions"
        )


@dataclass(frozen=True)
class Drift:
    """A float output over all samples: |after - before| / |before| in the Euclidean norm, and the cosine of both."""

    output: str
    error: float
    cosine: float

    def __str__(self) -> str:
        return f"{self.output} moved by {self.error:.1e} (relative, Euclidean), cosine {self.cosine:.6f}"


@dataclass(frozen=True)
class Judged:
    """The program after a pass beside the float program, on `data`: what passes may fit to, or what none has seen.

    `change` is what this pass added: to the perplexity of a language model, else to the largest error of an output.
    """

    data: str
    samples: int
    change: float
    quality: Quality | None = None
    drifts: tuple[Drift, ...] = ()

    def __str__(self) -> str:
        found = str(self.quality) if self.quality else "; ".join(map(str, self.drifts))
        return f"against float on {self.data} data: {found}; this pass {self.change:+.2g}"


def perplexity(program: Program, samples: Iterable[Sample]) -> float:
    """exp(mean -log p(next token)) over all samples, teacher forced; `CompileError` where there is no next token.

    Attention reads keys and values through the caches where the program has them, so that their rounding counts.
    """
    model = _required(program)
    total, positions = 0.0, 0
    for sample in samples:
        scores, wanted = predictions(program, model, sample)
        for rows, tokens in zip(scores.split(ROWS), wanted.split(ROWS), strict=True):
            total += float(F.cross_entropy(rows.double(), tokens, reduction="sum"))
        positions += len(wanted)
    return _exp(total, positions)


def compare(before: Program, after: Program, samples: Iterable[Sample], prompt: int = 0) -> Quality:
    """`after` beside `before` on the same samples; as in `perplexity`.

    With a `prompt`, so many tokens of each sample are read by `prefill`, and what follows counts as generated.
    """
    model, sums = _required(before), _Sums()
    for sample in samples:
        old, wanted = predictions(before, model, sample, prompt)
        new, _ = predictions(after, model, sample, prompt)
        for part in zip(old.split(ROWS), new.split(ROWS), wanted.split(ROWS), strict=True):
            sums.add(*part)
    return sums.quality()


def drift(before: Program, after: Program, samples: Iterable[Sample]) -> tuple[Drift, ...]:
    """How far each float output of `after` is from that of `before`."""
    sums: dict[str, _Moments] = {}
    for sample in samples:
        old, new = run(before, sample), run(after, sample)
        for output in before.main.outputs:
            if output.kind == "output" and old[output.name].is_floating_point():
                sums.setdefault(output.name, _Moments()).add(old[output.name], new[output.name])
    return tuple(moments.drift(name) for name, moments in sums.items())


def kl_rows(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats of each row of scores [rows, vocabulary], in float64; 0 log 0 is 0."""
    old, new = (F.log_softmax(t.double(), -1) for t in (before, after))
    weight = old.exp()
    return torch.where(weight == 0, 0.0, weight * (old - new)).sum(-1)


class Judge:
    """Keeps the program before the first lossy pass, and compares with it after each."""

    def __init__(self) -> None:
        self._float: Program | None = None
        self._last: dict[str, float] = {}

    def before(self, program: Program) -> None:
        """A lossy pass is about to run; without calibration data nothing is kept."""
        if self._float is None and program.calibration is not None:
            self._float = program.clone()

    def after(self, program: Program) -> tuple[Judged, ...]:
        """One comparison for the data to fit to, one for that held back; nothing without calibration data."""
        if self._float is None:
            return ()
        data = self._float.calibration or Calibration(())
        parts = {FIT: data.fit, HELD: data.held}
        return tuple(self._judge(self._float, program, name, part) for name, part in parts.items() if part)

    def _judge(self, before: Program, after: Program, name: str, samples: tuple[Sample, ...]) -> Judged:
        if language_model(before) is None:
            drifts = drift(before, after, _watched(samples, name))
            change = self._step(name, max((d.error for d in drifts), default=0.0), 0.0)
            return Judged(name, len(samples), change, drifts=drifts)
        quality = compare(before, after, _watched(samples, name))
        return Judged(name, len(samples), self._step(name, quality.perplexity, quality.perplexity_before), quality)

    def _step(self, name: str, found: float, first: float) -> float:
        change, self._last[name] = found - self._last.get(name, first), found
        return change


def _watched(samples: tuple[Sample, ...], name: str) -> Iterator[Sample]:
    for i, sample in enumerate(samples):
        report(f"measure on {name} data", i, len(samples))
        yield sample


@dataclass
class _Sums:
    """Running sums over rows of scores."""

    old: float = 0.0
    new: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, old: Tensor, new: Tensor, wanted: Tensor) -> None:
        self.old += float(F.cross_entropy(old.double(), wanted, reduction="sum"))
        self.new += float(F.cross_entropy(new.double(), wanted, reduction="sum"))
        self.kl += float(kl_rows(old, new).sum())
        self.agreed += int((old.argmax(-1) == new.argmax(-1)).sum())
        self.positions += len(wanted)

    def quality(self) -> Quality:
        count = max(self.positions, 1)
        before, after = (_exp(total, self.positions) for total in (self.old, self.new))
        return Quality(before, after, self.kl / count, self.agreed / count, self.positions)


@dataclass
class _Moments:
    """Running sums over an output: |after - before|^2, |before|^2, |after|^2 and their product."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, old: Tensor, new: Tensor) -> None:
        finite = old.isfinite() & new.isfinite()
        if not torch.equal(old[~finite], new[~finite]):
            self.sums[0] = math.inf
        a, b = (t[finite].double().flatten() for t in (old, new))
        self.sums += torch.stack([(b - a).square().sum(), a.square().sum(), b.square().sum(), a @ b])

    def drift(self, name: str) -> Drift:
        moved, old, new, product = self.sums.tolist()
        return Drift(name, math.sqrt(moved / max(old, TINY)), product / max(math.sqrt(old * new), TINY))


def _required(program: Program) -> LanguageModel:
    model = language_model(program)
    if model is None:
        hint = "`drift` compares the outputs of any program"
        raise CompileError("the program scores no next token: it is no causal language model", hint=hint)
    return model


def _exp(total: float, positions: int) -> float:
    """The perplexity; infinite where the exponential is, not a number when nothing was predicted."""
    return math.nan if not positions else float(torch.tensor(total / positions, dtype=torch.float64).exp())
