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

LEAST = 1e-100
"""Below it, temperatures would make differences of scores overflow."""


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

    def pick(self, logits: Scores, tokens: Ids, uniform: Chances | None = None) -> Ids:
        """One token id per row of logits [batch, vocabulary] that follow `tokens` [batch, n].

        `uniform` [batch], numbers in [0, 1), say where in the cumulated probabilities each choice falls; greedy choices
        need none.
        """
        scores = self._penalised(logits, tokens)
        best: Ids = scores.argmax(-1)
        _require_finite(scores, best, tokens)
        if self.temperature == 0 or uniform is None:
            return best
        cumulated = self._chances(scores).cumsum(-1)
        return (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(-1)

    def probabilities(self, logits: Scores, tokens: Ids) -> Chances:
        """What `pick` draws from, rows sum to 1; greedy: all on the best."""
        import numpy as np

        scores = self._penalised(logits, tokens)
        best = scores.argmax(-1)
        _require_finite(scores, best, tokens)
        if self.temperature:
            return self._chances(scores)
        chances = np.zeros(scores.shape)
        chances[np.arange(len(best)), best] = 1
        return chances

    def _penalised(self, logits: Scores, tokens: Ids) -> Scores:
        import numpy as np

        if self.repetition_penalty == 1:
            return logits
        scores, seen = logits.copy(), np.take_along_axis(logits, tokens, -1)
        seen = np.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
        np.put_along_axis(scores, tokens, seen, -1)
        return scores

    def _chances(self, scores: Scores) -> Chances:
        import numpy as np

        scaled = (scores - scores.max(-1, keepdims=True)).astype(np.float64) / max(self.temperature, LEAST)
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = np.partition(scaled, -self.top_k, -1)[:, -self.top_k, None]
            scaled = np.where(scaled < least, -np.inf, scaled)
        chances = np.exp(scaled)
        chances /= chances.sum(-1, keepdims=True)
        return chances if self.top_p is None else _nucleus(chances, self.top_p)


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


def _nucleus(chances: Chances, mass: float) -> Chances:
    """Zero every token after the first ones that together reach `mass`."""
    import numpy as np

    order = np.argsort(-chances, -1, kind="stable")
    ranked = np.take_along_axis(chances, order, -1)
    ranked[np.cumsum(ranked, -1) - ranked >= mass] = 0
    kept = np.empty_like(chances)
    np.put_along_axis(kept, order, ranked / ranked.sum(-1, keepdims=True), -1)
    return kept
