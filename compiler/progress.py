"""How long work reports where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Progress(Protocol):
    """Called with the stage, the steps done and the steps in all."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


_watcher: ContextVar[Progress] = ContextVar("progress", default=silent)


@contextmanager
def watching(progress: Progress) -> Iterator[None]:
    """Within the block `report` calls this one: for code that is not handed a `Progress`, such as passes."""
    token = _watcher.set(progress)
    try:
        yield
    finally:
        _watcher.reset(token)


def report(stage: str, done: int, total: int) -> None:
    """Tell whoever watches."""
    _watcher.get()(stage, done, total)
