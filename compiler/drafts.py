"""What proposes tokens: n-grams of what was read, and a cheaper entry of the artefact over the same caches."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sylvester.compiler.acceptance import Policy
from sylvester.compiler.manifest import DraftSpec
from sylvester.compiler.ngrams import LONGEST, WIDTH, NGrams
from sylvester.compiler.proposal import Draft
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sylvester.compiler.session import Logits

    Ids = NDArray[np.int64]
    Uniform = Callable[[int], NDArray[np.float64]]

LONG = 3
"""Tokens of a context that is trusted more than a model."""
FIRST = "first"
"""Kind of a first token that a model has yet to draft."""
SURE = (0.3, 0.6, 0.8, 0.95)
"""Probabilities between kinds of drafts."""
RARE = (0.02, 0.05, 0.1, 0.2)
"""Probabilities between kinds of siblings."""


class Drafter(Protocol):
    policy: Policy

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        """At most `most` tokens after `last` [batch], which comes after what the session holds.

        `uniform` gives the numbers [batch] that the choice at each place will be made with.
        """
        ...

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        """The session read tokens from `start` on, and keeps `kept`; logits [batch, n, :] came after the first n."""
        ...


class NGramDrafter:
    """Each row by what followed its last tokens, `least` of them or more; with `tree`, a single row by several."""

    def __init__(self, table: NGrams, policy: Policy, least: int = 1, tree: bool = False) -> None:
        self.table, self.policy, self.least, self.tree = table, policy, least, tree

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        import numpy as np

        draft = Draft()
        best = max(range(self.least, LONGEST + 1), key=self.policy.rate)
        if not draft.worth(self.policy, best):
            return draft
        rows = [[*row, int(t)] for row, t in zip(session.tokens[:, 1 - LONGEST :].tolist(), last, strict=True)]
        if self.tree and len(rows) == 1:
            self._grow(draft, tuple(rows[0]), most)
            return draft
        while len(draft.tokens) < most:
            found = [self.table.next(row, self.least) for row in rows]
            if None in found:
                break
            tokens = [token for token, _ in found]  # type: ignore[misc]
            kind = min(length for _, length in found)  # type: ignore[misc]
            if not draft.worth(self.policy, kind):
                break
            draft.add(self.policy, np.array(tokens), kind)
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
        return draft

    def _grow(self, draft: Draft, context: tuple[int, ...], most: int) -> None:
        """The likeliest first, as long as they pay."""
        import numpy as np

        heap: list[tuple[float, int, int, Hashable, tuple[int, ...]]] = []
        node, first = 0, self.table.next(context, self.least)
        while True:
            if first:
                chance = draft.reach[node] * self.policy.rate(first[1])
                heapq.heappush(heap, (-chance, node, *first, context))
            if not heap or len(draft.tokens) >= most:
                return
            _, parent, token, kind, before = heapq.heappop(heap)
            if not draft.worth(self.policy, kind, parent):
                return
            node = draft.add(self.policy, np.array([token]), kind, parent)
            if not isinstance(kind, tuple) and draft.spares(self.policy, parent, 1 - self.policy.rate(kind)):
                for other, length, rank in self.table.options(before, self.least)[1:]:
                    sibling = (length, rank)
                    chance = draft.reach[parent] * self.policy.rate(sibling)
                    heapq.heappush(heap, (-chance, parent, other, sibling, before))
            context = (*before, token)[-LONGEST:]
            first = self.table.next(context, self.least)

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        first = max(0, start - LONGEST)
        expected: list[list[int]] = logits.argmax(-1).tolist()
        for row, after in zip(session.tokens[:, first:].tolist(), expected, strict=True):
            self.table.read(row[: start - first + kept], start - first)
            for token, following in zip(row[start - first :], after, strict=False):
                self.table.guess(token, following)


class ModelDrafter:
    """A cheaper entry, which reads the caches of the model and writes what it drafts behind them.

    With `tree`, what it would draft else is proposed beside it, of a single row.
    """

    given: Mapping[str, NDArray[Any]] | None = None
    """Inputs of the entry but tokens and position."""

    def __init__(self, entry: str, policy: Policy, tree: bool = False) -> None:
        self.entry, self.policy, self.tree = entry, policy, tree

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        import numpy as np

        draft, tokens, start = Draft(), last, time.perf_counter()
        context = session.tokens if sampling.repetition_penalty != 1 else session.tokens[:, :0]
        likely: Hashable = FIRST
        others: list[tuple[float, int, int, Hashable]] = []
        while len(draft.tokens) < most and draft.worth(self.policy, likely):
            made = len(draft.tokens)
            logits = session.ahead(self.entry, tokens[:, None], made, self.given)
            context = np.concatenate([context, tokens[:, None]], 1) if context.shape[1] else context
            tokens = sampling.pick(logits, context, uniform(made))
            sure = confidence(logits, tokens)
            likely = f"model {int(np.searchsorted(SURE, sure))}"
            draft.add(self.policy, tokens, likely)
            if self.tree and len(last) == 1 and draft.spares(self.policy, made, 1 - sure):
                ranked = sampling.ranked(logits, context, uniform(made), WIDTH)
                for token, share in zip(ranked[0, 1:].tolist(), _shares(logits, ranked)[0, 1:].tolist(), strict=True):
                    kind: Hashable = ("model", int(np.searchsorted(RARE, share)))
                    others.append((-draft.reach[made] * self.policy.rate(kind), made, token, kind))
        steps = len(draft.tokens)
        for _, parent, token, kind in sorted(others, key=lambda other: other[0]):
            if len(draft.tokens) == most or not draft.worth(self.policy, kind, parent):
                break
            draft.add(self.policy, np.array([token]), kind, parent)
        if draft.tokens:
            draft.seconds = time.perf_counter() - start
            self.policy.drafting.add(draft.seconds / steps)
        return draft

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        return None


class Either:
    """N-grams where a long context is known, else the model."""

    def __init__(self, table: NGramDrafter, model: Drafter) -> None:
        self.table, self.model, self.policy = table, model, model.policy

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        found = self.table.propose(session, last, most, sampling, uniform)
        return found if found.tokens else self.model.propose(session, last, most, sampling, uniform)

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        self.table.learn(session, start, kept, logits)
        self.model.learn(session, start, kept, logits)


class Drafters:
    """What an artefact drafts with, kept from call to call: n-grams, rates and times."""

    def __init__(self, spec: DraftSpec | None) -> None:
        self.spec = spec or DraftSpec()
        self.tally = Drafting()
        self._table = NGrams()
        self._made: dict[tuple[DraftSpec, bool], Drafter] = {}

    def find(self, wanted: bool | str | None, greedy: bool = True) -> Drafter | None:
        """None: as compiled; False: none; "ngram": n-grams, whatever was compiled. Greedy calls have own rates."""
        spec = self.spec
        if wanted is not None and wanted is not True:
            spec = DraftSpec(ngram=wanted == "ngram", tree=spec.tree)
        if not spec.entry and not spec.ngram:
            return None
        if (spec, greedy) not in self._made:
            self._made[spec, greedy] = self._make(spec)
        return self._made[spec, greedy]

    def done(self) -> Drafting:
        """The tally so far, and what drafts by now."""
        made = [getattr(drafter, "model", drafter) for drafter in self._made.values()]
        found = [drafter.found_so_far() for drafter in made if hasattr(drafter, "found_so_far")]
        self.tally.found = "; ".join(dict.fromkeys(found))
        return self.tally

    def _make(self, spec: DraftSpec) -> Drafter:
        policy, tree = Policy(), bool(spec.tree)
        if not spec.entry:
            return NGramDrafter(self._table, policy, tree=tree)
        model = _model(spec, policy)
        return Either(NGramDrafter(self._table, policy, LONG, tree), model) if spec.ngram else model


@dataclass
class Drafting:
    """What drafting did so far: calls of the model, tokens that they made, tokens drafted, and drafts accepted."""

    rounds: int = 0
    made: int = 0
    drafted: int = 0
    accepted: int = 0
    found: str = ""
    """What was found to draft with, where that is chosen while generating."""

    @property
    def each(self) -> float:
        """Tokens that a call of the model makes."""
        return self.made / self.rounds if self.rounds else 0.0

    @property
    def share(self) -> float:
        """Part of the drafts that are accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        return (
            f"{self.made} tokens in {self.rounds} calls of the model ({self.each:.2f} a call), "
            f"{self.accepted} of {self.drafted} drafts accepted ({self.share:.0%})"
        ) + (f"; {self.found}" if self.found else "")


def _shares(logits: NDArray[Any], tokens: Ids) -> NDArray[np.floating[Any]]:
    """Probabilities [batch, n] of tokens [batch, n], of which the first of a row is among its likeliest."""
    import numpy as np

    found = np.take_along_axis(logits, tokens, -1)
    total = np.exp(np.minimum(logits - found[:, :1], 80)).sum(-1, keepdims=True)
    shares: NDArray[np.floating[Any]] = np.exp(found - found[:, :1]) / total
    return shares


def _model(spec: DraftSpec, policy: Policy) -> Drafter:
    if spec.chooses == "swift":
        from sylvester.compiler.swift import SwiftDrafter

        return SwiftDrafter(spec, policy)
    if spec.chooses == "exit":
        from sylvester.compiler.early_exit import ExitDrafter

        return ExitDrafter(spec, policy)
    return ModelDrafter(spec.entry, policy, bool(spec.tree))


def confidence(logits: NDArray[Any], tokens: Ids) -> float:
    """Probability of the token of the least sure row."""
    import numpy as np

    found = logits[np.arange(len(tokens)), tokens]
    share = 1 / np.exp(np.minimum(logits - found[:, None], 80)).sum(-1)
    return float(share.min())
