"""Tokens of a batch, some at a time: drafts are read together with the last token, and kept as far as the model agrees.

Every choice is made from logits that are, bit for bit, those of reading one token at a time, and with the same random
number: what is drafted changes how fast tokens come, and nothing else (Leviathan et al., 2023; Chen et al., 2023, who
keep the distribution only).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sylvester.compiler.drafts import FIRST, Draft, Drafter, Drafting
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

QUERIES, ROWS = 16, 64
"""Tokens of a row, and of all rows, that kernels read together without changing a bit."""


class Speculation:
    """Reads and chooses for the batch of a session; `uniform` gives the numbers [batch] of the next choice."""

    def __init__(
        self, session: Session, sampling: Sampling, uniform: Callable[[], NDArray[np.float64]], drafter: Drafter | None,
        done: Drafting,
    ) -> None:  # fmt: skip
        self.session, self.sampling, self.drafter, self.tally = session, sampling, drafter, done
        self._uniform = uniform
        self._drawn: list[NDArray[np.float64]] = []

    def first(self, tokens: Ids) -> Ids:
        """Read what the session does not hold of a prompt [batch, n]; the token [batch] after it."""
        logits = self.session.feed(tokens[:, self.session.position :])
        chosen = self._choose(logits, self.session.position)
        if self.drafter:
            self.drafter.learn(self.session, 0, tokens.shape[1], logits[:, None][:, :0])
        return chosen

    def next(self, last: Ids, most: int, finished: NDArray[np.bool_]) -> list[Ids]:
        """Read `last` [batch], chosen before; one to `most` new tokens [batch]. Rows `finished` are idle."""
        import numpy as np

        draft = self._draft(last, most - 1)
        start, began = self.session.position, time.perf_counter()
        logits = self.session.score(np.stack([last, *draft.tokens], 1))
        seconds = time.perf_counter() - began
        chosen = [self._choose(logits[:, 0], start + 1)]
        for number, proposed in enumerate(draft.tokens):
            if not ((chosen[-1] == proposed) | finished).all():
                break
            chosen.append(self._choose(logits[:, number + 1], start + number + 2))
        if self.drafter:
            self.drafter.learn(self.session, start, len(chosen), logits)
        self.session.rewind(start + len(chosen))
        self._count(draft, len(chosen), seconds)
        return chosen

    def _draft(self, last: Ids, most: int) -> Draft:
        room = self.session.limit - self.session.position - 1
        most = min(most, room, QUERIES - 1, ROWS // len(last) - 1, self.session.stretch() - 1)
        if self.drafter is None or most < 1 or not self.drafter.policy.allowed():
            return Draft()
        return self.drafter.propose(self.session, last, most, self.sampling, self._peek)

    def _peek(self, place: int) -> NDArray[np.float64]:
        """The number of the choice so many places after the next one."""
        while len(self._drawn) <= place:
            self._drawn.append(self._uniform())
        return self._drawn[place]

    def _choose(self, logits: NDArray[np.floating[Any]], position: int) -> Ids:
        uniform = self._drawn.pop(0) if self._drawn else self._uniform()
        return self.sampling.pick(logits, self.session.tokens[:, :position], uniform)

    def _count(self, draft: Draft, made: int, seconds: float) -> None:
        if self.drafter is None:
            return
        self.tally.rounds += 1
        self.tally.made += made
        self.tally.drafted += len(draft.tokens)
        self.tally.accepted += made - 1
        policy = self.drafter.policy
        for number, kind in enumerate(draft.kinds[:made]):
            policy.rates[kind].add(number < made - 1)
        if draft.seconds:
            policy.rates[FIRST].add(made > 1)
        policy.settle(len(draft.tokens) + 1, made, seconds, draft.seconds)
