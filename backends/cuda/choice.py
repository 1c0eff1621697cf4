"""Tokens chosen from logits on the device, exactly as the host would: only ids come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.ahead import Ahead
from sylvester.backends.cuda.memory import DeviceArray, Heap
from sylvester.compiler.sampling import LEAST, Sampling

Ids = NDArray[np.int64]
Chances = NDArray[np.float64]
PARTS = 16
"""Parts of a row that `best_parts` looks at."""
PLAIN, TOP_K, TOP_P = "draw", "draw_top_k", "draw_top_p"
MOST = 4096
"""Rows of one launch."""
ROOM = 8 * MOST * PARTS
PENALTY = "with a repetition penalty logits are read, and the host chooses"
Launch = Callable[[str, tuple[int, ...], list[Any]], None]


@dataclass
class Chooser:
    """`launch` starts a kernel by its role; `report` has room for `MOST` ids behind what kernels report, and `settled`
    raises that. `room` has `ROOM` bytes for what kernels are given. What comes `ahead` begins before the ids are known.
    """

    heap: Heap
    launch: Launch
    run: Callable[[Any, Callable[[], None]], None]
    report: int
    before: int
    settled: Callable[[NDArray[np.int64]], None]
    ahead: Ahead
    room: Callable[[], int]
    notes: list[str]

    def ids(self, scores: Scores, sampling: Sampling, uniform: Chances) -> Ids:
        """Of logits [rows, n] with adjacent columns; -1 - id where the host must choose."""
        rows, n = scores.shape
        with self.heap.lock:
            if sampling.temperature == 0:
                self._best(scores.address, rows, n, scores.strides[0] // 4)
            else:
                self._draw(scores.address, rows, n, scores.strides[0] // 4, sampling, uniform)
            coming = self.heap.device.begin_read(self.report, self.before + 8 * rows)
            self.ahead.begin(DeviceArray(self.heap, None, self.report + self.before, (rows, 1), np.dtype(np.int64)))
            found = self.heap.device.end_read(coming).view(np.int64)
            self.settled(found)
            ids = found[self.before // 8 :]
            self.ahead.decide(ids)
        return ids

    def _best(self, address: int, rows: int, n: int, stride: int) -> None:
        parts, ids = self.room(), self.report + self.before

        def launch() -> None:
            self.launch("best_parts", (rows, PARTS), [parts, address, n, stride])
            self.launch("best_of_parts", (rows,), [ids, parts])

        self.run(("best", address, rows, n, stride), launch)

    def _draw(self, address: int, rows: int, n: int, stride: int, sampling: Sampling, uniform: Chances) -> None:
        numbers, ids = self.room(), self.report + self.before
        self.heap.device.write(numbers, np.ascontiguousarray(uniform, np.float64))
        role = TOP_P if sampling.top_p is not None else TOP_K if sampling.top_k is not None else PLAIN
        limits = [max(sampling.temperature, LEAST), min(sampling.top_k or n, n), float(sampling.top_p or 1.0)]

        def launch() -> None:
            self.launch(role, (rows,), [ids, address, numbers, n, stride, *limits])

        self.run((role, address, rows, n, stride, *limits), launch)


class Scores(DeviceArray):
    """Logits [..., n] on the device."""

    chooser: Chooser

    @staticmethod
    def of(array: DeviceArray, chooser: Chooser) -> Scores:
        made = Scores(array.heap, array.memory, array.address, array.shape, array.dtype, array.strides)
        made.chooser = chooser
        return made

    def together(self, sampling: Sampling, uniform: Chances) -> Chosen:
        """All choices after logits [batch, n] or [batch, m, n], made at once; with them `uniform` of the same sizes."""
        flat = self if self.ndim == 2 else self.rows()
        spread, parts = uniform.reshape(-1), range(0, len(flat), MOST)
        ids = [self.chooser.ids(flat[at : at + MOST], sampling, spread[at : at + MOST]) for at in parts]
        return Chosen(np.concatenate([*ids, np.empty(0, np.int64)]).reshape(self.shape[:-1]), self, uniform)

    def pick(self, sampling: Sampling, tokens: Ids, uniform: Chances) -> Ids:
        """As `Sampling.pick` of logits [batch, n]."""
        if sampling.repetition_penalty == 1:
            return self.together(sampling, uniform).pick(sampling, tokens, uniform)
        if PENALTY not in self.chooser.notes:
            self.chooser.notes.append(PENALTY)
        return sampling.pick(self.numpy(), tokens, uniform)  # type: ignore[arg-type]

    def argmax(self, axis: int = -1) -> Ids:
        """The first place of the largest of each row; the last axis only."""
        assert axis == -1
        ids = self.together(Sampling(), np.zeros(self.shape[:-1])).ids
        return np.where(ids < 0, -1 - ids, ids)


@dataclass(frozen=True)
class Chosen:
    """Ids that were chosen at once; those that rounding, or the host, must decide are when they are asked for."""

    ids: Ids
    scores: Scores
    uniform: Chances

    def __getitem__(self, key: Any) -> Chosen:
        return Chosen(self.ids[key], self.scores[key], self.uniform[key])

    def pick(self, sampling: Sampling, tokens: Ids, uniform: Chances) -> Ids:
        if (self.ids >= 0).all():
            return self.ids
        return sampling.pick(self.scores.numpy(), tokens, self.uniform)  # type: ignore[arg-type]
