"""What runs the entries of an artefact: numpy in, numpy out, and the state that lives across calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.target import host_architecture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sylvester.compiler.manifest import Manifest

    Arrays = Mapping[str, NDArray[np.generic]]


SHARED, PADDING = "shared", "padding"
"""Names of the inputs that are `State.shared` and `State.padding`."""


@dataclass
class State:
    """The arrays of every slot for one batch of sequences, and how many positions of them are filled.

    Below position `shared` row 0 holds what all rows share; the arrays of the others hold nothing there. Of a call the
    last `padding` tokens are none.
    """

    arrays: dict[str, NDArray[np.generic]]
    position: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    shared: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        self.shapes = tuple(array.shape for array in self.arrays.values())


class Runner(Protocol):
    """A loaded artefact. A scalar integer input of an entry with state is `State.position`, or `State.shared` or
    `State.padding` by name.

    Callers do not give it.

    A runner of a device may have `there`, which is `run` with outputs that stay on it: they become numpy arrays when
    asked to, know their indices, and may have `pick` and `argmax`, which choose tokens there, and `together`, which
    makes all choices of several positions at once. If it has `expect` too, it begins to read a token that it chooses
    before the caller knows it.
    """

    manifest: Manifest

    def new_state(self, entry: str, inputs: Arrays) -> State:
        """Empty state that fits a call of `entry` with these inputs."""
        ...

    def run(self, entry: str, inputs: Arrays, state: State | None = None) -> dict[str, NDArray[np.generic]]:
        """Outputs by name, in fresh arrays; the arrays of `state` change in place, its position does not."""
        ...

    def close(self) -> None: ...


@dataclass
class RunsElsewhere:
    """Stands for the code of an artefact that was built for another architecture: it can be saved, not run."""

    manifest: Manifest

    def new_state(self, entry: str, inputs: Arrays) -> State:
        raise self._error()

    def run(self, entry: str, inputs: Arrays, state: State | None = None) -> dict[str, NDArray[np.generic]]:
        raise self._error()

    def close(self) -> None:
        return None

    def _error(self) -> Unsupported:
        if self.manifest.target == "wasm":
            return Unsupported(
                "this artefact was compiled for the web: it runs in a page or in Node",
                hint="`sylvester serve FOLDER` opens it as a page; Node imports FOLDER/model.js",
            )
        return Unsupported(
            f"this artefact was compiled for {self.manifest.arch}, this machine is {host_architecture()}",
            hint="save it and load it there",
        )


def entry_of(manifest: Manifest, name: str) -> str:
    """`name` if there is such an entry."""
    if name not in manifest.entries:
        raise CompileError(f"no entry named {name!r}", hint=f"the artefact has {list(manifest.entries)}")
    return name
