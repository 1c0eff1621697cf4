"""The compiled code of a CPU artefact through ctypes: pick the variant this CPU has, bind its functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sylvester.codegen import isa as isas
from sylvester.codegen.isa import Isa
from sylvester.compiler import knobs
from sylvester.compiler.errors import ArtefactError, Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.target import host_architecture

ABI = 2
Int64s = ctypes.POINTER(ctypes.c_int64)
Doubles = ctypes.POINTER(ctypes.c_double)
SIGNATURES = {
    "arena": (Int64s,),
    "shapes": (Int64s, Int64s),
    "run": (ctypes.c_void_p, Int64s, ctypes.c_void_p),
    "profile": (ctypes.c_void_p, Int64s, ctypes.c_void_p, Doubles),
    "costs": (Int64s, ctypes.c_int64, Doubles, Doubles),
}
WITHOUT_RESULT = ("shapes", "costs")


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
            (verb, name): self._function(
                f"sv_{verb}_{name}", None if verb in WITHOUT_RESULT else ctypes.c_int64, *arguments
            )
            for name in entries
            for verb, arguments in SIGNATURES.items()
        }

    def entry(self, verb: str, name: str) -> ctypes._NamedFuncPointer:
        """`arena`, `shapes`, `run`, `profile` or `costs` of one entry."""
        return self._entries[verb, name]

    def _function(self, name: str, result: type | None, *arguments: Any) -> ctypes._NamedFuncPointer:
        if not hasattr(self._code, name):
            raise ArtefactError(f"{self.path.name} has no function {name}", hint="compile the model again")
        function: ctypes._NamedFuncPointer = getattr(self._code, name)
        function.restype = result
        function.argtypes = list(arguments)
        return function


_opened: dict[str, list[tuple[int, int]]] = {}
"""Absolute path -> device and inode of every file that was found there; loaded code stays mapped, so none is reused."""


def _unambiguous(path: Path) -> str:
    """The path with one `.` for every file that lay there before: dlopen goes by the name before it reads the file."""
    folder, name = os.path.split(os.path.abspath(path))
    found = os.stat(path)
    files = _opened.setdefault(os.path.join(folder, name), [])
    if (found.st_dev, found.st_ino) not in files:
        files.append((found.st_dev, found.st_ino))
    return os.path.join(folder, *["."] * files.index((found.st_dev, found.st_ino)), name)


def _open(path: Path) -> ctypes.CDLL:
    try:
        code = ctypes.CDLL(_unambiguous(path))
    except OSError as error:
        raise ArtefactError(f"cannot load {path}: {error}", hint="artefacts are for Linux") from error
    if not hasattr(code, "sv_abi"):
        raise ArtefactError(f"{path.name} is not code of an artefact: it has no function sv_abi")
    code.sv_abi.restype = ctypes.c_int64
    return code


def cpu_level(baseline: Path) -> int:
    """What this CPU can run, asked from the baseline build, which every CPU of the architecture can execute."""
    return int(_open(baseline).sv_isa_level())


@dataclass(frozen=True)
class Choice:
    """The variant to load, and why it is not a better one where that needs saying."""

    path: Path
    notes: tuple[str, ...] = ()


def choose(folder: Path, manifest: Manifest) -> Choice:
    """The best variant in `folder/code` that this CPU has and may use, or the one the knob forces."""
    architecture = manifest.arch or host_architecture()
    if architecture != host_architecture():
        raise ArtefactError(
            f"the artefact is for {architecture}, this machine is {host_architecture()}",
            hint=f"load it there, or compile with Target('cpu', arch={host_architecture()!r})",
        )
    known = isas.of(architecture)
    isa, notes = usable(known, manifest.isas, folder / "code" / f"{known[0].name}.so")
    return Choice(folder / "code" / f"{isa.name}.so", notes)


def usable(known: Sequence[Isa], names: Sequence[str], baseline: Path) -> tuple[Isa, tuple[str, ...]]:
    """The best of the named variants that this process may use, and why not a better one, asked from the baseline."""
    notes: list[str] = []
    for isa in _candidates(known, names, cpu_level(baseline)):
        if not isa.permission or _open(baseline).sv_permit_tiles() == 0:
            return isa, tuple(notes)
        notes.append(f"{isa.name} is not used: the kernel refused this process the AMX tile registers")
    raise Unsupported(notes[-1], hint=f"unset {knobs.ISA.name}, or compile with every variant")


def _candidates(known: Sequence[Isa], names: Sequence[str], level: int) -> list[Isa]:
    """The variants that may be loaded, the best first: those this CPU has, or the forced one alone."""
    carried = [isa for isa in known if isa.name in names]
    best = max((isa for isa in known if isa.level <= level), key=lambda isa: isa.level).name
    forced = knobs.ISA.get()
    if forced and forced not in names:
        raise Unsupported(
            f"{knobs.ISA.name}={forced!r}, but the artefact has {list(names)}", hint="unset it or choose one of these"
        )
    wanted = [isa for isa in carried if not forced or isa.name == forced]
    fit = [isa for isa in wanted if isa.level <= level]
    if forced and not fit:
        raise Unsupported(
            f"{knobs.ISA.name}={forced!r}, but this CPU has {best} at most", hint=f"unset it or use {best}"
        )
    if not fit:
        raise Unsupported(
            f"this CPU has {best} at most, the artefact has {list(names)}", hint="compile it with every variant"
        )
    return sorted(fit, key=lambda isa: -isa.level)
