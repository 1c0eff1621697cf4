"""The call that reads a token, begun while the host does not know the token yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.memory import DeviceArray
from sylvester.compiler.runner import State

Outputs = dict[str, DeviceArray]
Ids = NDArray[np.int64]


@dataclass
class Step:
    """A call of `entry` for ids [batch, 1], at the position where the state is."""

    entry: str
    name: str
    state: State
    batch: int
    outputs: Outputs | None = None
    ids: Ids | None = None

    def __post_init__(self) -> None:
        self.place = (self.state.position, self.state.shared)

    def serves(self, entry: str, inputs: Mapping[str, Any], state: State | None) -> bool:
        """Whether it is the call that is asked for."""
        return (
            self.ids is not None
            and self.entry == entry
            and self.state is state
            and self.place == (state.position, state.shared)
            and [*inputs] == [self.name]
            and np.array_equal(inputs[self.name], self.ids[:, None])
        )


class Ahead:
    """At most one step ahead. One for other ids than were read in the end does no harm: what it writes into caches lies
    behind what they hold.

    `run` begins a call, and `forgive` forgets what it reported: -1 - id is no id, and says that the host must choose.
    """

    def __init__(self, run: Callable[[str, Mapping[str, Any], State], Outputs], forgive: Callable[[], None]) -> None:
        self._run, self._forgive = run, forgive
        self._expected: Step | None = None
        self._begun: Step | None = None

    def expect(self, step: Step | None) -> None:
        """What the next choice is made for."""
        self._expected = step

    def begin(self, ids: DeviceArray) -> None:
        """For ids [rows, 1] that were chosen on the device."""
        step, self._expected = self._expected, None
        if step and len(ids) == step.batch:
            step.outputs, self._begun = self._run(step.entry, {step.name: ids}, step.state), step

    def decide(self, ids: Ids) -> None:
        """The ids are these."""
        if self._begun and (ids < 0).any():
            self._forgive()
            self._begun = None
        elif self._begun:
            self._begun.ids = ids

    def take(self, entry: str, inputs: Mapping[str, Any], state: State | None) -> Outputs | None:
        """The outputs of a call that was begun; None where it was not."""
        begun, self._begun, self._expected = self._begun, None, None
        return begun.outputs if begun and begun.serves(entry, inputs, state) else None
