"""The files of a page beside code and weights: the JavaScript runtime, the page, the code of the tokenizer."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from sylvester.backends.web_tokenizer import copy_tokenizer
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program


def write_bundle(program: Program, folder: Path) -> list[str]:
    """Copies backends/web, which needs no build step; notes on what could not be put in."""
    _copy(resources.files("sylvester.backends").joinpath("web"), folder)
    if not program.info.get("tokenizer"):
        return []
    try:
        copy_tokenizer(folder / "vendor")
    except CompileError as error:
        return [f"the bundle takes token ids only, no text: {error} ({error.hint})"]
    return []


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            _copy(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
