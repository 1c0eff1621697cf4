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
        """A session at the end of the longest known beginning of `prompt` [batch, length], never all of it."""
        for common, session in sorted(self._candidates(prompt), key=lambda found: -found[0]):
            if self._removed(session):
                session.rewind(common if SHARE * common >= prompt.shape[1] else 0)
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

    def _candidates(self, prompt: Ids) -> list[tuple[int, Session]]:
        return [(_common(s.tokens, prompt), s) for s in tuple(self._kept) if len(s.tokens) == len(prompt)]

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
