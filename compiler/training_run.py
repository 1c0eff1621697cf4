"""The steps of a training run: progress, states on disk, Ctrl-C between two steps, and a loss that stays finite."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sylvester.compiler.batches import Batches, Part
from sylvester.compiler.descent import Descent, Loss, Workers
from sylvester.compiler.errors import CompileError
from sylvester.compiler.progress import Progress
from sylvester.compiler.training_state import Checkpoint

SECONDS = 60.0
"""Between two states on disk."""


@dataclass
class Run:
    """The steps of one call, from where an earlier one stopped."""

    descent: Descent
    loss: Loss
    batches: Batches
    checkpoint: Checkpoint | None
    progress: Progress
    saved: int | None = None

    def resume(self) -> None:
        if self.checkpoint is None:
            return
        self.checkpoint.prepare()
        found = self.checkpoint.load()
        if found is not None:
            self.descent.restore(*found)
            self.saved = self.descent.done

    def finish(self, pool: Workers) -> None:
        saved = time.perf_counter()
        pace = Pace(self.descent.done)
        try:
            while self.descent.done < self.descent.steps:
                parts = self.batches.at(self.descent.done)
                value = self.descent.gradient(self.loss, parts, pool)
                self._require_finite(value)
                if time.perf_counter() - saved > SECONDS:
                    self._save()
                    saved = time.perf_counter()
                with uninterrupted():
                    self.descent.step()
                stage = f"fine-tune: loss {value:.4g}, {pace.per_second(parts):.0f} tokens/s"
                self.progress(stage, self.descent.done, self.descent.steps)
            self._check_last(pool)
        except KeyboardInterrupt as stop:
            self._save()
            kept = f"{self._where(self.descent.done)}: the same call goes on from there"
            stop.add_note(kept if self.checkpoint else "no checkpoint folder was given: the steps are lost")
            raise
        self._save()

    def notes(self) -> list[str]:
        idle = self.descent.idle()
        return [f"{len(idle)} weights stay as they are: no gradient reaches them"] if idle else []

    def _check_last(self, pool: Workers) -> None:
        """The loss after the last step, on the batch before it."""
        parts = self.batches.at(self.descent.done - 1)
        with torch.no_grad():
            self._require_finite(sum(pool.map(lambda part: float(self.loss(self.descent.weights, part)), parts)))

    def _require_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise CompileError(
                f"the loss is {value} at step {self.descent.done + 1} of {self.descent.steps}: training has diverged; "
                + (self._where(self.saved) if self.saved is not None else "nothing was kept"),
                hint=f"give a learning rate below {self.descent.learning_rate:g}, with another checkpoint folder",
            )

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.save(self.descent.state(), self.descent.done)
            self.saved = self.descent.done

    def _where(self, done: int) -> str:
        folder = str(self.checkpoint.folder) if self.checkpoint else ""
        return f"the state after step {done} is in {folder!r}"


class Pace:
    """Tokens, or values of samples, a second since it was made."""

    def __init__(self, done: int) -> None:
        self._start, self._tokens = time.perf_counter(), 0

    def per_second(self, parts: Sequence[Part]) -> float:
        self._tokens += sum(next(iter(part.sample.values())).numel() for part in parts)
        return self._tokens / max(time.perf_counter() - self._start, 1e-9)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: weights and moments change together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt
