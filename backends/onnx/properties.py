"""What a runtime has to know of each graph: a file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "graphs.json"


@dataclass(frozen=True)
class Properties:
    """`rows_alone`: several tokens meet filled caches of one row only. `accuracy_level`: a setting of onnxruntime for
    layers with weights of whole numbers, 1 for rows that are not rounded; None leaves it.
    """

    rows_alone: bool = False
    accuracy_level: int | None = None


def write_properties(folder: Path, entries: Mapping[str, Properties]) -> None:
    text = json.dumps({name: asdict(found) for name, found in entries.items()}, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_properties(folder: Path) -> dict[str, Properties]:
    data = json.loads((folder / FILE).read_bytes())
    return {name: Properties(**found) for name, found in data.items()}
