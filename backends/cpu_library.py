"""The compiled code of a CPU artefact through ctypes: pick the variant this CPU has, bind its functions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sylvester.codegen.isa import ISAS
from sylvester.compiler import knobs
from sylvester.compiler.errors import ArtefactError, Unsupported

ABI = 1
LEVELS = {isa.name: isa.level for isa in ISAS}
Int64s = ctypes.POINTER(ctypes.c_int64)
SIGNATURES = {"arena": (Int64s,), "shapes": (Int64s, Int64s), "run": (ctypes.c_void_p, Int64s, ctypes.c_void_p)}


class Library:
    """One loaded .so. `run(entry)` and friends are C functions with their types set."""

    def __init__(self, path: Path, entries: Sequence[str]) -> None:
        self.path = path
        self._code = _open(path)
        found = self._code.sv_abi()
        if found != ABI:
            raise ArtefactError(
                f"{path.name} has ABI {found}, this version calls ABI {ABI}", hint="compile the model again"
            )
        self.team_new = self._function("sv_team_new", ctypes.c_void_p, ctypes.c_int)
        self.team_free = self._function("sv_team_free", None, ctypes.c_void_p)
        self.error_value = self._function("sv_team_error_value", ctypes.c_int64, ctypes.c_void_p)
        self._entries = {
            (verb, name): self._function(f"sv_{verb}_{name}", None if verb == "shapes" else ctypes.c_int64, *arguments)
            for name in entries
            for verb, arguments in SIGNATURES.items()
        }

    def entry(self, verb: str, name: str) -> ctypes._NamedFuncPointer:
        """`arena`, `shapes` or `run` of one entry."""
        return self._entries[verb, name]

    def _function(self, name: str, result: type | None, *arguments: Any) -> ctypes._NamedFuncPointer:
        if not hasattr(self._code, name):
            raise ArtefactError(f"{self.path.name} has no function {name}", hint="compile the model again")
        function: ctypes._NamedFuncPointer = getattr(self._code, name)
        function.restype = result
        function.argtypes = list(arguments)
        return function


def _open(path: Path) -> ctypes.CDLL:
    try:
        code = ctypes.CDLL(str(path))
    except OSError as error:
        raise ArtefactError(f"cannot load {path}: {error}", hint="the artefact is for Linux on x86-64") from error
    if not hasattr(code, "sv_abi"):
        raise ArtefactError(f"{path.name} is not code of an artefact: it has no function sv_abi")
    code.sv_abi.restype = ctypes.c_int64
    return code


def cpu_level(scalar: Path) -> int:
    """What this CPU can run, asked from the baseline build, which every CPU can execute."""
    return int(_open(scalar).sv_isa_level())


def choose(folder: Path, isas: Sequence[str]) -> Path:
    """The best variant of `folder/code` this CPU has, or the one the knob forces."""
    level = cpu_level(folder / "code" / "scalar.so")
    forced = knobs.ISA.get()
    if forced:
        _check_forced(forced, isas, level)
        return folder / "code" / f"{forced}.so"
    fit = [isa for isa in isas if LEVELS.get(isa, level + 1) <= level]
    if not fit:
        raise Unsupported(
            f"this CPU has level {level}, the artefact has {list(isas)}", hint="compile with the scalar variant"
        )
    return folder / "code" / f"{max(fit, key=LEVELS.__getitem__)}.so"


def _check_forced(forced: str, isas: Sequence[str], level: int) -> None:
    if forced not in isas:
        raise Unsupported(
            f"{knobs.ISA.name}={forced!r}, but the artefact has {list(isas)}", hint="unset it or choose one of these"
        )
    if LEVELS.get(forced, 0) > level:
        best = max((isa for isa in ISAS if isa.level <= level), key=lambda isa: isa.level).name
        raise Unsupported(
            f"{knobs.ISA.name}={forced!r}, but this CPU has {best} at most", hint=f"unset it or use {best}"
        )
