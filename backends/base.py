"""What a backend is: it builds a folder of code and weights from a program, or says what it cannot lower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.target import Target


class Backend(ABC):
    """Building may need torch and a C compiler; what runs the folder is named in `backends.LOADERS` and may not."""

    name: ClassVar[str]

    @abstractmethod
    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        """Write code and weights under `folder`; the manifest returned lists no files yet.

        `Unsupported` names the ops that have no lowering; `ToolchainMissing` when code cannot be compiled.
        """
