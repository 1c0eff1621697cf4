"""The next token from the logits: greedy, or drawn at a temperature from the top k or the top-p nucleus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sylvester.compiler.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. `top_k` keeps the k best, `top_p` the best that make up p (Holtzman, 2020)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected more than 0 and at most 1")

    def pick(self, logits: NDArray[np.floating[Any]], random: np.random.Generator) -> NDArray[np.int64]:
        """One token id per row of logits [batch, vocabulary]."""
        import numpy as np

        if self.temperature == 0:
            return np.asarray(logits.argmax(-1), np.int64)
        return np.array([random.choice(row.size, p=row) for row in self.probabilities(logits)], np.int64)

    def probabilities(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """What `pick` draws from, rows sum to 1."""
        import numpy as np

        scores = logits.astype(np.float64) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = np.partition(scores, -self.top_k, -1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        return chances if self.top_p is None else _nucleus(chances, self.top_p)


def _nucleus(chances: NDArray[np.float64], mass: float) -> NDArray[np.float64]:
    """Zero every token after the first ones that together reach `mass`."""
    import numpy as np

    order = np.argsort(-chances, -1, kind="stable")
    ranked = np.take_along_axis(chances, order, -1)
    ranked[np.cumsum(ranked, -1) - ranked >= mass] = 0
    kept = np.empty_like(chances)
    np.put_along_axis(kept, order, ranked / ranked.sum(-1, keepdims=True), -1)
    return kept
