"""What a backend is: it builds a folder of code and weights from a program, or says what it cannot lower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from sylvester.compiler.ledger import Fusion
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.recipe import Machine
from sylvester.compiler.target import Target


class Backend(ABC):
    """Building may need torch and a C compiler; what runs the folder is named in `backends.LOADERS` and may not."""

    name: ClassVar[str]
    tunes: ClassVar[bool] = False
    """Whether it takes `Target.tune`."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of `Target.options` that it takes."""
    engines: ClassVar[tuple[str, ...]] = ()
    """What it takes of `Target.engines`."""
    shares: ClassVar[bool] = False
    """Whether its attention takes `shared`: keys that all rows of a batch read from row 0."""
    pads: ClassVar[bool] = False
    """Whether calls of few sizes run faster, so that prompts are padded."""
    notes: Sequence[str] = ()
    """What the last build has to say in the ledger."""
    fusions: Sequence[Fusion] = ()
    """What the kernels of the last build do together."""
    facts: Mapping[str, object] = MappingProxyType({})
    """Numbers of the last build for the report, by topic."""

    @abstractmethod
    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        """Write code and weights under `folder`; the manifest returned lists no files yet.

        `Unsupported` names the ops that have no lowering; `ToolchainMissing` when code cannot be compiled.
        """

    def machine(self, program: Program, target: Target) -> Machine | None:
        """What passes may ask about the target to decide about the program; None where it cannot be timed here."""
        return None

    def identity(self, target: Target) -> tuple[str, ...] | None:
        """What decides the result of `build` besides program, target and this package: tools, measurements.

        None, the default: it cannot be told, so that nothing built before is reused.
        """
        return None
