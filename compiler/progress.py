"""How long work reports where it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage, the steps done and the steps in all."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""
