"""The files of a page beside code and weights: the JavaScript runtime and what describes it."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from sylvester.compiler.program import Program


def write_bundle(program: Program, folder: Path) -> None:
    """Copies backends/web, which needs no build step."""
    _copy(resources.files("sylvester.backends").joinpath("web"), folder)


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            _copy(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
