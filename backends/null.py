"""Builds nothing and runs nothing: artefacts without code, for tests on machines without a toolchain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.runner import State

if TYPE_CHECKING:
    from sylvester.compiler.program import Program
    from sylvester.compiler.progress import Progress
    from sylvester.compiler.target import Target


class Null:
    """A backend of the shape of `Backend` that can be imported without torch."""

    name: ClassVar[str] = "null"

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        from sylvester.backends.signature import manifest

        return manifest(program, target)

    def machine(self, program: Program, target: Target) -> None:
        return None

    def identity(self, target: Target) -> tuple[str, ...] | None:
        return None


@dataclass(frozen=True)
class NullRunner:
    manifest: Manifest

    def new_state(self, entry: str, inputs: Mapping[str, Any]) -> State:
        return State({})

    def run(self, entry: str, inputs: Mapping[str, Any], state: State | None = None) -> dict[str, Any]:
        raise Unsupported(
            f"an artefact for the null target has no code to run {entry!r}", hint="compile with target='cpu'"
        )

    def close(self) -> None:
        return None


def load(folder: Path, manifest: Manifest, threads: int | None = None) -> NullRunner:
    return NullRunner(manifest)
