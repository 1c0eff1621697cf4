"""Launches that were made before, given to the device at once (CUDA graphs)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from sylvester.backends.cuda.device import Device

KEPT, REMEMBERED = 64, 256
"""Graphs, and keys that were seen once."""


class Graphs:
    """A graph for what comes again; the least recently used one goes first.

    Equal keys must make equal launches: of the same kernels on the same addresses.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._made: OrderedDict[Hashable, object] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Launched at first sight; captured at the second, and replayed from then on."""
        if key in self._made:
            self._made.move_to_end(key)
        elif key in self._seen:
            self._made[key] = self._captured(launch)
            del self._seen[key]
            self._drop(KEPT)
        else:
            launch()
            self._seen[key] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return
        self.device.replay(self._made[key])

    def clear(self) -> None:
        self._seen.clear()
        self._drop(0)

    def _drop(self, kept: int) -> None:
        while len(self._made) > kept:
            self.device.forget(self._made.popitem(last=False)[1])

    def _captured(self, launch: Callable[[], None]) -> object:
        self.device.begin_capture()
        try:
            launch()
        except BaseException:
            self.device.forget(self.device.end_capture())
            raise
        return self.device.end_capture()
