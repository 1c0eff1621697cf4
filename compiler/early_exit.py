"""Drafts by the first layers of the model: before each round, the exit and the length that promise most are chosen.

DEL (Zarch et al., 2025): for every exit l, a_l is the rate at which its tokens are those of the model. The expected
tokens of a round over its cost, (1 - a^(d+1)) / (1 - a) / (d cost_l + cost of reading d + 1), choose l and d; d = 0 is
plain decoding. Costs are seconds here, where DEL counts layers. The tokens of exits that do not draft come from reading
what was generated last once more, at an exit at a time, as far as the policy lets a search cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sylvester.compiler.acceptance import FADING, Mean, Policy
from sylvester.compiler.drafts import FIRST, confidence
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
    Floats = NDArray[np.float64]

GRID = 8
"""Exits that are considered, at even distances."""
WINDOW, LEAST = 16, 8
"""Tokens that a look at an exit reads, and how many must have been generated for one."""
LONGEST = 15
"""Drafts of a round at most."""
SOON, WAIT = 8, (32, 1024)
"""Rounds between first looks at exits, and between later ones: at first, and at most."""


def tokens_per_cost(rates: Floats, drafts: Floats, whole: Floats) -> Floats:
    """Expected tokens of a round over its cost [exits, lengths], for lengths from 0 on (TPL).

    Of each exit `rates` has the rate at which its tokens are the model's, `drafts` the cost of one; `whole` has the
    cost of verifying each length.
    """
    import numpy as np

    lengths = np.arange(len(whole))
    expected: Floats = np.cumsum(rates[:, None] ** lengths, 1)
    return expected / (drafts[:, None] * lengths + whole)


def exits(layers: int) -> list[int]:
    """How many layers run before each exit: at most `GRID` numbers from 1 to layers - 1."""
    count = min(GRID, layers - 1)
    return sorted({max(1, round(n * layers / (count + 1))) for n in range(1, count + 1)})


@dataclass
class Agreement:
    """Part of an exit's tokens that are the model's: older rounds fade, and one of each was there before."""

    matched: float = 0.0
    total: float = 0.0

    def add(self, matched: int, total: int) -> None:
        self.matched, self.total = FADING * self.matched + matched, FADING * self.total + total

    @property
    def rate(self) -> float:
        return (self.matched + 1) / (self.total + 2)

    @property
    def hoped(self) -> float:
        """A standard deviation above the rate."""
        return min(1.0, self.rate + math.sqrt(self.rate * (1 - self.rate) / (self.total + 3)))


@dataclass
class Middle:
    """Drafting ends after a token less sure than the middle of what accepted and rejected drafts were of late."""

    accepted: float = 0.0
    rejected: float = 0.0

    def learn(self, sure: Sequence[float], accepted: int) -> None:
        for number, each in enumerate(sure[: accepted + 1]):
            name = "accepted" if number < accepted else "rejected"
            known = getattr(self, name)
            setattr(self, name, FADING * known + (1 - FADING) * each if known else each)

    def __float__(self) -> float:
        return (self.accepted + self.rejected) / 2 if self.accepted and self.rejected else 0.0


class ExitDrafter:
    """Drafts by an entry that skips all parts from a layer on."""

    def __init__(self, spec: DraftSpec, policy: Policy) -> None:
        import numpy as np

        self.entry, self.policy = spec.entry, policy
        self.depth = max(spec.layers) + 1
        self.skips = {n: (np.array(spec.layers) >= n).astype(np.float32) for n in exits(self.depth)}
        self.found = {n: Agreement() for n in self.skips}
        self.middle = Middle()
        self._seconds = {n: Mean() for n in self.skips}
        self._last: tuple[int, list[float]] | None = None
        self._choice: tuple[int, int] | None = None
        self._rounds, self._next, self._wait = 0, 0, WAIT[0]

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        import numpy as np

        draft, tokens, sure = Draft(), last, list[float]()
        layer, length = self.choose(most)
        if not length:
            return draft
        start = time.perf_counter()
        context = session.tokens if sampling.repetition_penalty != 1 else session.tokens[:, :0]
        while len(sure) < length and (not sure or sure[-1] >= float(self.middle)):
            made = len(sure)
            logits = session.ahead(self.entry, tokens[:, None], made, {SKIPS: self.skips[layer]})
            context = np.concatenate([context, tokens[:, None]], 1) if context.shape[1] else context
            tokens = sampling.pick(logits, context, uniform(made))
            sure.append(confidence(logits, tokens))
            draft.add(self.policy, tokens, f"exit {layer}")
        self._last, draft.seconds = (layer, sure), time.perf_counter() - start
        self._seconds[layer].add(draft.seconds / len(sure))
        self.policy.rate(FIRST)
        return draft

    def choose(self, most: int) -> tuple[int, int]:
        """The exit and the number of drafts that promise most tokens a second; (0, 0) where plain decoding does."""
        if self._choice is None:
            rates = {n: agreement.rate for n, agreement in self.found.items() if agreement.total}
            self._choice = self._best(rates)
        layer, length = self._choice
        return layer, min(length, most)

    def due(self) -> int:
        """The exit to look at: one that was not looked at yet and could pay, else the one that may pay most, or 0."""
        could = (n for n, agreement in self.found.items() if not agreement.total and self._best({n: 1.0})[1])
        return next(could, 0) or self._best({n: known.hoped for n, known in self.found.items() if known.total})[0]

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        self._rounds += 1
        if self._last:
            layer, sure = self._last
            self.found[layer].add(min(kept - 1, len(sure)), min(kept, len(sure)))
            self.middle.learn(sure, kept - 1)
            self._last = self._choice = None
        end = start + kept
        count = min(WINDOW, end - session.prompt)
        if self._rounds >= self._next and count >= LEAST and self.policy.affords(0.0):
            began = time.perf_counter()
            layer = self.due()
            known = self.found[layer].total if layer else 1.0
            if layer and self.policy.affords(self._share(layer) * self.policy.reading(count)):
                self._look(session, layer, end - count, end)
            self._next = self._rounds + (self._pause() if known else SOON)
            self.policy.charge(time.perf_counter() - began)

    def found_so_far(self) -> str:
        """What drafts, for a person."""
        layer, length = self._choice or (0, 0)
        rates = ", ".join(f"{known.rate:.0%} after {n}" for n, known in self.found.items() if known.total)
        chosen = f"{length} drafts by {layer} of {self.depth} layers" if length else "no exit pays"
        return f"exit: {chosen}; tokens that are the model's: {rates or 'unknown'}"

    def _look(self, session: Session, layer: int, start: int, end: int) -> None:
        """What the exit makes of the tokens before those from `start` to `end`, which the model chose."""
        logits = session.again(self.entry, start - 1, end - 1, {SKIPS: self.skips[layer]})
        agree = (logits.argmax(-1) == session.tokens[:, start:end]).all(0)
        self.found[layer].add(int(agree.sum()), len(agree))
        self._choice = None

    def _pause(self) -> int:
        """Rounds until the next look: longer and longer while drafting does not pay."""
        self._wait = WAIT[0] if self.choose(1)[1] else min(2 * self._wait, WAIT[1])
        return self._wait

    def _best(self, rates: Mapping[int, float]) -> tuple[int, int]:
        """The exit and length of most tokens a second; (0, 0) where none is above plain decoding."""
        import numpy as np

        if not rates:
            return 0, 0
        whole = np.array([self.policy.reading(n + 1) for n in range(LONGEST + 1)])
        table = tokens_per_cost(np.array([*rates.values()]), np.array([*map(self._cost, rates)]), whole)
        exit_, length = np.unravel_index(table.argmax(), table.shape)
        return ([*rates][exit_], int(length)) if length else (0, 0)

    def _cost(self, layer: int) -> float:
        """Seconds of a draft: as measured, or by the layers that it runs, the head counted as one."""
        measured = self._seconds[layer]
        return measured.value if measured.count else self._share(layer) * self.policy.reading(1)

    def _share(self, layer: int) -> float:
        return (layer + 1) / (self.depth + 1)
