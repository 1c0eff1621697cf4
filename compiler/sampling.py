"""The next token from the logits: greedy, or drawn at a temperature from the top k or the top-p nucleus."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from sylvester.compiler.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Scores = NDArray[np.floating[Any]]
    Chances = NDArray[np.float64]

LEAST = 1e-30
"""Temperatures below it draw what it draws: float32 has no smaller ones."""
FEW = 64
"""How many of the best tokens are sorted first to find a nucleus."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the options of Hugging Face generation, applied in its order.

    `repetition_penalty` divides the positive scores of tokens that occur in the sequence, and multiplies the negative
    ones. `temperature` 0 is greedy. `top_k` keeps the k best, `top_p` the best that make up p (Holtzman, 2020).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        require("temperature", self.temperature, Real, lambda t: 0 <= t < math.inf, "0 (greedy) or more")
        require(
            "repetition_penalty", self.repetition_penalty, Real, lambda p: 0 < p < math.inf, "more than 0; 1 is none"
        )
        if self.top_k is not None:
            require("top_k", self.top_k, Integral, lambda k: k >= 1, "a whole number, 1 or more, or None")
        if self.top_p is not None:
            require("top_p", self.top_p, Real, lambda p: 0 < p <= 1, "more than 0 and at most 1, or None")

    def pick(self, logits: Scores, tokens: Ids, uniform: Chances) -> Ids:
        """One token id per row of logits [batch, vocabulary] that follow `tokens` [batch, n].

        The numbers `uniform` [batch], each in [0, 1), decide: with equal ones, scores that differ little mostly give
        the same token. Logits that choose by themselves, on a device, do.
        """
        import numpy as np

        if chooses := getattr(logits, "pick", None):
            chosen: Ids = chooses(self, tokens, uniform)
            return chosen
        scores = self._penalised(logits, tokens)
        best: Ids = scores.argmax(-1)
        _require_finite(scores, best, tokens)
        if self.temperature == 0:
            return best
        return np.array([self._drawn(row, number) for row, number in zip(scores, uniform, strict=True)], np.int64)

    def ranked(self, logits: Scores, tokens: Ids, uniform: Chances, count: int) -> Ids:
        """What `pick` gives and what it would give without it, and so on: [batch, count], or fewer if there are.

        More than one of a single row only.
        """
        import numpy as np

        best = self.pick(logits, tokens, uniform)
        if count == 1:
            return best[:, None]
        scores = self._penalised(logits, tokens)[0]
        ids = _best(scores, count)
        order = -scores[ids]
        if self.temperature:
            ids, weights = self._kept(scores)
            with np.errstate(divide="ignore"):
                order = _waits(ids, uniform[0]) / weights
        others = ids[order.argsort(kind="stable")[:count]]
        found: Ids = np.concatenate([best, others[others != best[0]]])[None, :count]
        return found

    def probabilities(self, logits: Scores, tokens: Ids) -> Chances:
        """What `pick` draws from [batch, vocabulary], rows sum to 1; greedy: all on the best."""
        import numpy as np

        scores = self._penalised(logits, tokens)
        best = scores.argmax(-1)
        _require_finite(scores, best, tokens)
        chances = np.zeros(scores.shape)
        for row, number in enumerate(best):
            ids, weights = self._kept(scores[row]) if self.temperature else (number, np.ones(()))
            chances[row, ids] = weights / weights.sum()
        return chances

    def _penalised(self, logits: Scores, tokens: Ids) -> Scores:
        import numpy as np

        if self.repetition_penalty == 1:
            return logits
        scores, seen = logits.copy(), np.take_along_axis(logits, tokens, -1)
        seen = np.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
        np.put_along_axis(scores, tokens, seen, -1)
        return scores

    def _drawn(self, scores: Scores, uniform: float) -> int:
        """The first to arrive of tokens that come at random times, each at the rate of its chance."""
        import numpy as np

        ids, weights = self._kept(scores)
        with np.errstate(divide="ignore"):
            return int(ids[(_waits(ids, uniform) / weights).argmin()])

    def _kept(self, scores: Scores) -> tuple[Ids, Chances]:
        """The ids that may be drawn from a row of scores [vocabulary], and numbers in the ratio of their chances."""
        import numpy as np

        ids = np.arange(scores.size) if self.top_k is None else _best(scores, self.top_k)
        with np.errstate(over="ignore"):
            weights = np.exp((scores[ids] - scores.max()) / max(self.temperature, LEAST)).astype(np.float64)
        if self.top_p is None:
            return ids, weights
        nucleus = _nucleus(weights, self.top_p)
        return ids[nucleus], weights[nucleus]


def _waits(ids: Ids, uniform: float) -> Chances:
    """A number > 0 for each id, as if drawn from the exponential distribution; equal `uniform` gives equal numbers.

    The bits are those of SplitMix64 (Steele et al., 2014), seeded with the bits of `uniform`.
    """
    import numpy as np

    z = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.float64(uniform).view(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Chances = -np.log(((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)
    return found


def require(name: str, value: object, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
    """`InputError` unless the option is a number of this kind that fits."""
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise InputError(f"{name} is {value!r}, expected {expected}")


def _require_finite(scores: Scores, best: Ids, tokens: Ids) -> None:
    """NaN sorts above all numbers: the best of a row is finite only if the row is fit to choose from."""
    import numpy as np

    found = scores[np.arange(len(best)), best]
    if np.isfinite(found).all():
        return
    row = int(np.isfinite(found).argmin())
    raise InputError(
        f"the best logit of row {row} is {found[row]} after {tokens.shape[1]} tokens, expected a finite number",
        hint="look for NaN or infinity in the weights of the model, or compile without the lossy passes",
    )


def _nucleus(weights: Chances, mass: float) -> Ids:
    """The first ids in falling order of weight that together reach `mass` of the sum."""
    wanted, count, reached = mass * weights.sum(), FEW, -1.0
    while reached < wanted:
        ids = _best(weights, count)
        ids = ids[(-weights[ids]).argsort(kind="stable")]
        ranked = weights[ids]
        cumulated = ranked.cumsum()
        reached = wanted if len(ids) == len(weights) else cumulated[-1]
        count *= 8
    nucleus: Ids = ids[cumulated - ranked < wanted]
    return nucleus


def _best(scores: Scores, count: int) -> Ids:
    """Ids of the `count` best scores of a row, in rising order, and of those equal to the last of them."""
    import numpy as np

    if count >= scores.size:
        return np.arange(scores.size)
    height = max(1, scores.size // (8 * count))
    width = scores.size // height
    highest = scores[: height * width].reshape(height, width).max(0)
    ids = (scores >= np.partition(highest, -count)[-count]).nonzero()[0]
    found: Ids = ids[scores[ids] >= np.partition(scores[ids], -count)[-count]]
    return found
