"""What proposes tokens: n-grams of what was read, and a cheaper entry of the artefact over the same caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sylvester.compiler.acceptance import Policy
from sylvester.compiler.manifest import DraftSpec
from sylvester.compiler.ngrams import LONGEST, NGrams
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


class Draft:
    """Tokens [batch, n] and the kind of each, for rates of acceptance; `seconds` that a model took for them."""

    def __init__(self) -> None:
        self.tokens: list[Ids] = []
        self.kinds: list[object] = []
        self.seconds = 0.0
        self.expected, self.reach = 0.0, 1.0

    def worth(self, policy: Policy, kind: object) -> bool:
        """Whether one more token of this kind pays."""
        return policy.pays(len(self.tokens), self.expected, self.reach * policy.rate(kind))

    def add(self, policy: Policy, tokens: Ids, kind: object) -> None:
        self.tokens.append(tokens)
        self.kinds.append(kind)
        self.reach *= policy.rate(kind)
        self.expected += self.reach


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
    """Each row by what followed its last tokens, `least` of them or more."""

    def __init__(self, table: NGrams, policy: Policy, least: int = 1) -> None:
        self.table, self.policy, self.least = table, policy, least

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        import numpy as np

        draft = Draft()
        best = max(range(self.least, LONGEST + 1), key=self.policy.rate)
        if not draft.worth(self.policy, best):
            return draft
        rows = [[*row, int(t)] for row, t in zip(session.tokens[:, 1 - LONGEST :].tolist(), last, strict=True)]
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

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        first = max(0, start - LONGEST)
        expected: list[list[int]] = logits.argmax(-1).tolist()
        for row, after in zip(session.tokens[:, first:].tolist(), expected, strict=True):
            self.table.read(row[: start - first + kept], start - first)
            for token, following in zip(row[start - first :], after, strict=False):
                self.table.guess(token, following)


class ModelDrafter:
    """A cheaper entry, which reads the caches of the model and writes what it drafts behind them."""

    def __init__(self, entry: str, policy: Policy) -> None:
        self.entry, self.policy = entry, policy

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        import numpy as np

        draft, tokens, start = Draft(), last, time.perf_counter()
        context = session.tokens if sampling.repetition_penalty != 1 else session.tokens[:, :0]
        likely: object = FIRST
        while len(draft.tokens) < most and draft.worth(self.policy, likely):
            made = len(draft.tokens)
            logits = session.ahead(self.entry, tokens[:, None], made)
            context = np.concatenate([context, tokens[:, None]], 1) if context.shape[1] else context
            tokens = sampling.pick(logits, context, uniform(made))
            likely = _kind(logits, tokens)
            draft.add(self.policy, tokens, likely)
        if draft.tokens:
            draft.seconds = time.perf_counter() - start
            self.policy.drafting.add(draft.seconds / len(draft.tokens))
        return draft

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        return None


class Either:
    """N-grams where a long context is known, else the model."""

    def __init__(self, table: NGramDrafter, model: ModelDrafter) -> None:
        self.table, self.model, self.policy = table, model, model.policy

    def propose(self, session: Session, last: Ids, most: int, sampling: Sampling, uniform: Uniform) -> Draft:
        found = self.table.propose(session, last, most, sampling, uniform)
        return found if found.tokens else self.model.propose(session, last, most, sampling, uniform)

    def learn(self, session: Session, start: int, kept: int, logits: Logits) -> None:
        self.table.learn(session, start, kept, logits)


class Drafters:
    """What an artefact drafts with, kept from call to call: n-grams, rates and times."""

    def __init__(self, spec: DraftSpec | None) -> None:
        self.spec = spec or DraftSpec()
        self.tally = Drafting()
        self._table = NGrams()
        self._made: dict[tuple[DraftSpec, bool], Drafter] = {}

    def find(self, wanted: bool | str | None, greedy: bool = True) -> Drafter | None:
        """None: as compiled; False: none; "ngram": n-grams, whatever was compiled. Greedy calls have own rates."""
        spec = DraftSpec(ngram=True) if wanted == "ngram" else DraftSpec() if wanted is False else self.spec
        if spec == DraftSpec():
            return None
        if (spec, greedy) not in self._made:
            self._made[spec, greedy] = self._make(spec)
        return self._made[spec, greedy]

    def _make(self, spec: DraftSpec) -> Drafter:
        policy = Policy()
        if not spec.entry:
            return NGramDrafter(self._table, policy)
        model = ModelDrafter(spec.entry, policy)
        return Either(NGramDrafter(self._table, policy, LONG), model) if spec.ngram else model


@dataclass
class Drafting:
    """What drafting did so far: calls of the model, tokens that they made, tokens drafted, and drafts accepted."""

    rounds: int = 0
    made: int = 0
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        each = self.made / self.rounds if self.rounds else 0.0
        share = self.accepted / self.drafted if self.drafted else 0.0
        return (
            f"{self.made} tokens in {self.rounds} calls of the model ({each:.2f} a call), "
            f"{self.accepted} of {self.drafted} drafts accepted ({share:.0%})"
        )


def _kind(logits: NDArray[Any], tokens: Ids) -> str:
    """How sure the least sure row is."""
    import numpy as np

    found = logits[np.arange(len(tokens)), tokens]
    share = 1 / np.exp(np.minimum(logits - found[:, None], 80)).sum(-1)
    return f"model {int(np.searchsorted(SURE, share.min()))}"
