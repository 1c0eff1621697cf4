"""kernels.json of an artefact: what the kernels of every entry are called, in the order in which they run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.schema import SchemaError, load

if TYPE_CHECKING:
    from sylvester.codegen.costs import Cost

NAME = "kernels.json"


@dataclass(frozen=True)
class KernelSpec:
    """`labels`: graph node and module path of everything the kernel computes. `streams`: it reads weights or state."""

    name: str
    labels: tuple[str, ...]
    arithmetic: str
    streams: bool

    @property
    def title(self) -> str:
        """Name, operations and module; equal for the same kernel of every layer."""
        nodes = [label.partition(" ")[0] for label in self.labels]
        modules = [label.partition(" ")[2] for label in self.labels]
        done = dict.fromkeys(re.sub(r"(_default)?(_\d+)?$", "", node) for node in nodes)
        place = re.sub(r"\b\d+\b", "*", max(modules, key=len, default=""))
        work = "" if list(done) == [self.name] else "+".join(done)
        return " ".join(part for part in (self.name, work, place) if part)


@dataclass(frozen=True)
class KernelTable:
    entries: dict[str, tuple[KernelSpec, ...]]


def write_table(folder: Path, costs: Mapping[str, Sequence[Cost]]) -> None:
    table = KernelTable(
        {entry: tuple(KernelSpec(c.name, c.labels, c.arithmetic, c.streams) for c in of) for entry, of in costs.items()}
    )
    (folder / NAME).write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")


def read_table(folder: Path) -> KernelTable:
    """`ArtefactError` when the artefact has none or it is not what this version writes."""
    path = folder / NAME
    if not path.is_file():
        raise ArtefactError(f"{str(folder)!r} has no {NAME}", hint="compile the model again for the cpu target")
    try:
        return load(KernelTable, json.loads(path.read_bytes()))
    except (ValueError, SchemaError) as error:
        raise ArtefactError(f"{path}: {error}", hint="compile the model again") from error
