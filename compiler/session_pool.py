"""Sessions of finished calls, so that a prompt which begins like an earlier one is not read again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sylvester.compiler.runner import Runner
from sylvester.compiler.session import Session

if TYPE_CHECKING:
    from sylvester.compiler.session import Ids

KEPT = 1
SHARE = 4
"""One part in so many of a prompt must be known: the rest is read by `decode`, which does more work than `start`."""


class SessionPool:
    """At most `kept` sessions; the least recently used goes first. Whoever takes one has it alone."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept: deque[Session] = deque(maxlen=kept)

    def take(self, runner: Runner, prompt: Ids, chunk: int = 0) -> Session:
        """A session at the end of the longest known beginning of `prompt` [batch, length], never all of it.

        Without one, the oldest begins anew if the pool is full.
        """
        for common, session in self._fit(prompt):
            if self._removed(session):
                session.rewind(common)
                session.prompt, session.chunk = prompt.shape[1], chunk
                return session
        return Session.begin(runner, prompt, chunk)

    @contextmanager
    def returned(self, session: Session) -> Iterator[None]:
        """Keeps the session after use, unless an error ended it."""
        keep = True
        try:
            yield
        except Exception:
            keep = False
            raise
        finally:
            if keep:
                self._kept.append(session)

    def clear(self) -> None:
        self._kept.clear()

    def _fit(self, prompt: Ids) -> list[tuple[int, Session]]:
        """(position to go on from, session) of as many rows, the best first."""
        kept = tuple(self._kept)
        alike = [(_common(s.tokens, prompt), s) for s in kept if len(s.tokens) == len(prompt)]
        known = sorted((x for x in alike if SHARE * x[0] >= prompt.shape[1]), key=lambda x: -x[0])
        return known + [(0, s) for _, s in alike if len(kept) == self._kept.maxlen]

    def _removed(self, session: Session) -> bool:
        """False when another thread has taken it."""
        try:
            self._kept.remove(session)
        except ValueError:
            return False
        return True


def _common(tokens: Ids, prompt: Ids) -> int:
    """How many first tokens of all rows are equal; less than the prompt has."""
    length = min(tokens.shape[1], prompt.shape[1] - 1)
    differs = (tokens[:, :length] != prompt[:, :length]).any(0)
    return int(differs.argmax()) if differs.any() else length
