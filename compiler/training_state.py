"""A training run on disk: one safetensors file that is replaced whole, so that it is never half of two states."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sylvester.compiler.digest import Digest
from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.finished import tensor_sum
from sylvester.compiler.program import Program, binding

FILE = "training.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of one run in a folder. `about` names what decides the result: another value is another run."""

    folder: Path
    about: Mapping[str, str]

    def prepare(self) -> None:
        """Make the folder; `CompileError` where that cannot be done, before any work."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "give a folder that can be written to"
            raise CompileError(f"cannot keep states in {str(self.folder)!r}: {error.strerror}", hint=hint) from error

    def save(self, tensors: Mapping[str, Tensor], done: int) -> None:
        facts = json.dumps({"format": FORMAT, "done": done, "about": dict(self.about)})
        made = self.folder / f"{FILE}.{os.getpid()}"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, made, metadata={"run": facts})
        made.replace(self.folder / FILE)

    def load(self) -> tuple[dict[str, Tensor], int] | None:
        """Tensors and steps done; None when there is nothing yet, `CompileError` when it is of another run."""
        path = self.folder / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})["run"])
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            found, done = dict(facts["about"]), int(facts["done"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            hint = "delete the file to start again"
            raise ArtefactError(f"{str(path)!r} is no state of a training run: {error}", hint=hint) from error
        other = [name for name, text in self.about.items() if found.get(name) != text]
        if other:
            changes = ", ".join(_change(name, found.get(name, ""), self.about[name]) for name in other)
            hint = "give another folder, or delete the file to start again"
            raise CompileError(f"{str(path)!r} is of another run: {changes}", hint=hint)
        return tensors, done


def _change(name: str, old: str, new: str) -> str:
    digests = max(len(old), len(new)) >= 64
    return f"the {name} differs" if digests else f"{name} was {old or 'absent'}, is {new}"


def program_sum(program: Program) -> str:
    """A digest of graphs and weights."""
    digest = Digest()
    for name, entry in program.entries.items():
        digest.text(name, str(entry.graph), *(f"{binding(n)}" for n in entry.placeholders()))
    digest.text(*(f"{key} {tensor_sum(program.weights[key])}" for key in program.weights))
    return digest.hex()
