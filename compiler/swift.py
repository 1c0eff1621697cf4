"""Drafts by the model without some of its parts, chosen while it generates: SWIFT (Xia et al., 2025).

The score of a set of parts is its matchness: how many of the tokens generated last it guesses right from those before
them, read all at once. Sets are proposed at random, and at times by a surrogate; the best so far drafts. Proposals are
scored as the policy lets a search cost: out of a small part of all time, and of what drafting gained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sylvester.compiler.acceptance import Policy
from sylvester.compiler.drafts import ModelDrafter
from sylvester.compiler.early_exit import LONGEST, tokens_per_cost
from sylvester.compiler.manifest import DraftSpec
from sylvester.compiler.proposal import Draft
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import Session
from sylvester.compiler.stages import SKIPS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sylvester.compiler.drafts import Uniform
    from sylvester.compiler.session import Logits

    Ids = NDArray[np.int64]
    Parts = NDArray[np.bool_]

RATIO = 0.45
"""Part of the parts between the first and the last layer that is skipped."""
WINDOW = 33
"""Tokens that a score is over."""
EVERY = 2
"""Proposals of which one is the surrogate's; 25 in SWIFT, which can afford more of them."""
NOISE, CURIOSITY = 1e-2, 1.0
"""Variance of scores, and standard deviations above the mean that the surrogate hopes for; 2.5 in SWIFT."""
HOPE = 0.1
"""What sets may do better than their score, and are tried for: about its standard deviation."""
ENOUGH, TOLERANCE, MOST = 0.95, 300, 1000
"""Where the search ends: above this score, after so many proposals that were no better, after so many in all."""


class Surrogate:
    """Score of a set ~ mean + sum of what each of its parts adds: Bayesian linear regression, a GP of a linear kernel.

    The prior of each part is as wide as the noise. On the shipped model, sets that it finds hold as well on text that
    was not searched on as those of a GP of an RBF kernel (matchness 0.83 and 0.76 after 150 proposals, at random 0.70).
    """

    def __init__(self, parts: int) -> None:
        import numpy as np

        self._precision = np.eye(parts)
        self._sums, self._ones = np.zeros(parts), np.zeros(parts)
        self._total, self._count = 0.0, 0

    def add(self, chosen: Parts, score: float) -> None:
        import numpy as np

        self._precision += np.outer(chosen, chosen)
        self._sums += score * chosen
        self._ones += chosen
        self._total, self._count = self._total + score, self._count + 1

    def propose(self, count: int) -> Parts:
        """The parts that add most to the score, if each adds `CURIOSITY` standard deviations above its mean."""
        import numpy as np

        inverse = np.linalg.inv(self._precision)
        mean = inverse @ (self._sums - self._ones * self._total / max(self._count, 1))
        hoped = mean + CURIOSITY * np.sqrt(NOISE * np.diag(inverse))
        chosen: Parts = np.zeros(len(mean), bool)
        chosen[np.argsort(-hoped, kind="stable")[:count]] = True
        return chosen


class Search:
    """The best set of parts to skip so far [parts], of those between the first and the last layer."""

    def __init__(self, layers: Sequence[int], seed: int = 0) -> None:
        import numpy as np

        numbers = np.array(layers)
        self.free = np.flatnonzero((numbers > 0) & (numbers < numbers.max()))
        self.count = math.floor(len(self.free) * RATIO)
        self.best: Parts = (numbers % 2 == 1) & (numbers < numbers.max())
        self.score, self.tried, self.worse = -1.0, 0, 0
        self._random, self._surrogate = np.random.default_rng(seed), Surrogate(len(self.free))

    @property
    def done(self) -> bool:
        return self.score > ENOUGH or self.worse > TOLERANCE or self.tried > MOST

    def propose(self) -> Parts:
        """The set to score next, the one to begin with first."""
        import numpy as np

        chosen: Parts = np.zeros(len(self.best), bool)
        if not self.tried:
            return self.best
        if self.tried % EVERY:
            chosen[self._random.choice(self.free, self.count, replace=False)] = True
        else:
            chosen[self.free] = self._surrogate.propose(self.count)
        return chosen

    def learn(self, chosen: Parts, score: float) -> bool:
        """Whether a set with this score is the best so far."""
        self._surrogate.add(chosen[self.free], score)
        better = score > self.score
        if better:
            self.best, self.score = chosen, score
        self.tried, self.worse = self.tried + 1, 0 if better else self.worse + 1
        return better


class SwiftDrafter(ModelDrafter):
    """Drafts by an entry without the best set of parts so far, once its score promises that this pays.

    What is drawn at random agrees more often than the score says: then the policy alone decides.
    """

    def __init__(self, spec: DraftSpec, policy: Policy) -> None:
        super().__init__(spec.entry, policy, bool(spec.tree))
        self.search = Search(spec.layers)
        self.given = _given(self.search.best)
        self.promises = False

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        if sampling.temperature == 0 and not self.promises:
            return Draft()
        return super().propose(session, last, most, sampling, uniform)

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        end = start + kept
        if self.search.done or end - session.prompt < WINDOW or not self.policy.affords(self._price()):
            return
        began, chosen = time.perf_counter(), self.search.propose()
        if self.search.learn(chosen, matchness(session, self.entry, chosen, end)):
            self.given, self.promises = _given(chosen), self._pays(chosen, self.search.score + HOPE)
            if self.promises:
                self.policy.retry()
        self.policy.charge(time.perf_counter() - began)

    def found_so_far(self) -> str:
        """What drafts, for a person."""
        search = self.search
        score = f"{search.score:.2f}" if search.tried else "unknown"
        skipped = f"{int(search.best.sum())} of {len(search.best)} parts are skipped"
        return f"swift: {skipped}, matchness {score} after {search.tried} proposals"

    def _price(self) -> float:
        """Seconds that a score takes."""
        return self.policy.reading(WINDOW) * (1 - RATIO)

    def _pays(self, skipped: Parts, rate: float) -> bool:
        """Whether drafts that are accepted at this rate make tokens come sooner; the head counts as two parts."""
        import numpy as np

        reading = self.policy.reading
        cost = reading(1) * (len(skipped) - skipped.sum() + 2) / (len(skipped) + 2)
        whole = np.array([reading(n + 1) for n in range(LONGEST + 1)])
        return bool(tokens_per_cost(np.array([min(rate, 1.0)]), np.array([cost]), whole).argmax())


def matchness(session: Session, entry: str, chosen: Parts, end: int) -> float:
    """How many of the `WINDOW` tokens held before `end` the entry without some parts guesses, in one call."""
    start = end - WINDOW
    logits = session.again(entry, start - 1, end - 1, _given(chosen))
    return float((logits.argmax(-1) == session.tokens[:, start:end]).mean())


def _given(chosen: Parts) -> dict[str, NDArray[np.float32]]:
    return {SKIPS: chosen.astype("float32")}
