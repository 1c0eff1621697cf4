"""sylvester: a graph-rewriting compiler for PyTorch models. Every name loads what it needs when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sylvester import passes as passes
    from sylvester.compiler.compiled import Compiled as Compiled
    from sylvester.compiler.compiled import load as load
    from sylvester.compiler.driver import compile as compile
    from sylvester.compiler.driver import trace as trace
    from sylvester.compiler.errors import CompileError as CompileError
    from sylvester.compiler.program import Program as Program
    from sylvester.compiler.target import Target as Target

__version__ = "0.1.0"

_PLACES = {
    "CompileError": "sylvester.compiler.errors",
    "Compiled": "sylvester.compiler.compiled",
    "Program": "sylvester.compiler.program",
    "Target": "sylvester.compiler.target",
    "compile": "sylvester.compiler.driver",
    "load": "sylvester.compiler.compiled",
    "trace": "sylvester.compiler.driver",
}

__all__ = ["CompileError", "Compiled", "Program", "Target", "compile", "load", "passes", "trace"]


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("sylvester.passes")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'sylvester' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
