"""Tokens of a batch, some at a time: drafts are read together with the last token, and kept as far as the model agrees.

Every choice is made from logits that are, bit for bit, those of reading one token at a time, and with the same random
number: what is drafted changes how fast tokens come, and nothing else (Leviathan et al., 2023; Chen et al., 2023, who
keep the distribution only).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sylvester.compiler.drafts import FIRST, Drafter, Drafting
from sylvester.compiler.proposal import Draft
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sylvester.compiler.session import Logits

    Ids = NDArray[np.int64]

QUERIES, ROWS = 16, 64
"""Tokens of a row, and of all rows, that kernels read together without changing a bit."""


class Speculation:
    """Reads and chooses for the batch of a session; `uniform` gives the numbers [batch] of the next choice."""

    def __init__(
        self, session: Session, sampling: Sampling, uniform: Callable[[], NDArray[np.float64]], drafter: Drafter | None,
        done: Drafting, tree: str = "",
    ) -> None:  # fmt: skip
        self.session, self.sampling, self.drafter, self.tally = session, sampling, drafter, done
        self._tree = tree
        self._uniform = uniform
        self._drawn: list[NDArray[np.float64]] = []

    def first(self, tokens: Ids) -> Ids:
        """Read what the session does not hold of a prompt [batch, n]; the token [batch] after it."""
        logits = self.session.feed(tokens[:, self.session.position :])
        chosen = self._choose(logits, self.session.tokens)
        if self.drafter:
            self.drafter.learn(self.session, 0, tokens.shape[1], logits[:, None][:, :0])
        return chosen

    def next(self, last: Ids, most: int, finished: NDArray[np.bool_]) -> list[Ids]:
        """Read `last` [batch], chosen before; one to `most` new tokens [batch]. Rows `finished` are idle."""
        draft = self._draft(last, most - 1)
        start, began = self.session.position, time.perf_counter()
        order, logits, choices = self._read(last, draft, self.drafter is None and most > 1 and not finished.any())
        seconds = time.perf_counter() - began
        path, chosen = self._walk(draft, order, choices, finished)
        rows = [order.index(node) for node in path]
        if rows != [*range(len(rows))]:
            self.session.keep(start, rows)
            logits = logits[:, [*rows, *(n for n in range(len(order)) if n not in rows)]]
        if self.drafter:
            self.drafter.learn(self.session, start, len(chosen), logits)
        self.session.rewind(start + len(chosen))
        self._count(draft, path, seconds)
        return chosen

    def _read(self, last: Ids, draft: Draft, goes_on: bool) -> tuple[list[int], Logits, Logits]:
        """The nodes in the order in which they were read, the logits after each, and what is chosen from."""
        import numpy as np

        order, depths = draft.preorder()
        tokens = np.stack([last, *(draft.tokens[node - 1] for node in order[1:])], 1)
        chain = depths == [*range(len(depths))]
        logits = self.session.score(tokens) if chain else self.session.branch(self._tree, tokens, depths)
        if goes_on:
            self.session.expect()
        together = getattr(logits, "together", None)
        if together is None or self.sampling.repetition_penalty != 1:
            return order, logits, logits
        return order, logits, together(self.sampling, np.stack([self._peek(depth) for depth in depths], 1))

    def _walk(
        self, draft: Draft, order: list[int], logits: Logits, finished: NDArray[np.bool_]
    ) -> tuple[list[int], list[Ids]]:
        """The nodes that the model agrees with, and what it chooses after each."""
        import numpy as np

        path: list[int] = [0]
        held = self.session.tokens[:, : self.session.position - len(order) + 1]
        chosen = [self._choose(logits[:, 0], held)]
        while True:
            children = (node for node, parent in enumerate(draft.parents, 1) if parent == path[-1])
            agreed = (n for n in children if ((chosen[-1] == draft.tokens[n - 1]) | finished).all())
            if (node := next(agreed, None)) is None:
                return path, chosen
            path.append(node)
            if self.sampling.repetition_penalty != 1:
                held = np.concatenate([held, chosen[-1][:, None]], 1)
            chosen.append(self._choose(logits[:, order.index(node)], held))

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

    def _choose(self, logits: NDArray[np.floating[Any]], tokens: Ids) -> Ids:
        uniform = self._drawn.pop(0) if self._drawn else self._uniform()
        return self.sampling.pick(logits, tokens, uniform)

    def _count(self, draft: Draft, path: list[int], seconds: float) -> None:
        if self.drafter is None:
            return
        made = len(path)
        self.tally.rounds += 1
        self.tally.made += made
        self.tally.drafted += len(draft.tokens)
        self.tally.accepted += made - 1
        policy = self.drafter.policy
        for node, (parent, kind) in enumerate(zip(draft.parents, draft.kinds, strict=True), 1):
            if parent in path:
                policy.rate_of(kind).add(node in path)
        if draft.seconds:
            policy.rate_of(FIRST).add(made > 1)
        policy.settle(len(draft.tokens) + 1, made, seconds, draft.seconds)
