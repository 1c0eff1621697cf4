"""Artefacts of earlier compilations, kept by a digest of everything that decides what an artefact holds."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from sylvester.compiler import knobs
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.digest import Digest, Opaque
from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.program import Program
from sylvester.compiler.store import link_tree, store
from sylvester.compiler.target import Target

if TYPE_CHECKING:
    pass

KIND = "models"
PACKAGES = ("sylvester", "compiler", "passes", "codegen", "backends")
LIBRARIES = ("torch", "transformers", "numpy", "safetensors")


class Builder(Protocol):
    """The part of a backend that matters here."""

    name: str

    def identity(self, target: Target) -> tuple[str, ...] | None: ...


@dataclass(frozen=True)
class Key:
    """Under what an artefact is kept; empty where it is not, and why."""

    text: str
    reason: str = ""

    @property
    def notes(self) -> list[str]:
        """What the ledger says of a model that will be compiled anew every time."""
        return [f"the next run compiles this model anew: {self.reason}"] if self.reason else []


def key(
    model: Any,
    example_inputs: Any,
    dynamic: Any,
    target: Target,
    steps: Sequence[object],
    backend: Builder,
    calibration: Any = None,
) -> Key:
    """What decides the artefact: model, inputs, options, data, this program's own code, libraries, compiler."""
    if knobs.REUSE.get() == "0" or not store(KIND).limit:
        return Key("")
    if target.tune is not None:
        return Key("")
    identity = backend.identity(target)
    if identity is None or isinstance(model, Program):
        return Key("")
    digest = Digest()
    digest.text(own_code(), platform.python_version(), *map(_version, LIBRARIES), *identity)
    digest.text(repr(target), target.architecture, knobs.CHECK.get(), *_modes())
    try:
        digest.add([_global_forward_pre_hooks, _global_forward_hooks])
        digest.add(list(steps))
        digest.add((example_inputs, dynamic, calibration))
        _add_model(digest, model)
    except Opaque as error:
        return Key("", f"it has {error}, which has no digest")
    except RecursionError:
        return Key("", "it is nested too deeply for a digest")
    return Key(digest.hex())


def _modes() -> tuple[str, ...]:
    """What PyTorch is told outside the model that changes the graph of a trace."""
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else "no cast"
    return str(torch.get_default_dtype()), str(torch.get_default_device()), str(cast)


def _add_model(digest: Digest, model: Any) -> None:
    if isinstance(model, torch.nn.Module):
        digest.add(model)
        return
    if not isinstance(model, (str, Path)):
        raise Opaque(f"the type {type(model).__name__}")
    path = Path(model)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.text(str(file.relative_to(path)), _file_sum(file))


def _file_sum(path: Path) -> str:
    if not path.is_file():
        raise Opaque(f"no file {str(path)!r}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def own_code() -> str:
    """A digest of every file of this program, so that editing it makes what it compiled before unknown."""
    found = hashlib.sha256()
    for name in PACKAGES:
        module = import_module("sylvester" if name == "sylvester" else f"sylvester.{name}")
        for folder in module.__path__:
            for path in sorted([*Path(folder).glob("*.py"), *Path(folder).glob("templates/*")]):
                found.update(f"{name}/{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def workplace(wanted: Key) -> Path:
    """A folder to build an artefact in, where it can be kept without copying it."""
    if wanted.text:
        with suppress(OSError):
            return store(KIND).workplace()
    return Path(tempfile.mkdtemp(prefix="sylvester-"))


def reuse(wanted: Key, threads: int | None) -> Compiled | None:
    """The artefact kept under a key, in a folder of its own; a damaged one is forgotten."""
    kept = store(KIND)
    entry = kept.find(wanted.text) if wanted.text else None
    if entry is None:
        return None
    folder = workplace(wanted)
    try:
        link_tree(entry, folder)
        compiled = Compiled.owning(folder, threads=threads)
    except (OSError, ArtefactError):
        shutil.rmtree(folder, ignore_errors=True)
        kept.drop(wanted.text)
        return None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _say(compiled, wanted)
    return compiled


def _say(compiled: Compiled, wanted: Key) -> None:
    """The report of a reused artefact says so; the one on disk stays that of the compilation."""
    note = f"reused what an earlier run compiled ({wanted.text[:12]}); {knobs.REUSE.name}=0 compiles anew"
    ledger = dict(compiled.report.get("ledger", {}))
    ledger["text"] = "\n".join(filter(None, [ledger.get("text", ""), f"note: {note}"]))
    compiled.report |= {"ledger": ledger, "reused": wanted.text}


def keep(wanted: Key, folder: Path) -> None:
    """Keep a finished artefact; a cache folder that cannot be written is no reason to fail."""
    if not wanted.text:
        return
    kept = store(KIND)
    with suppress(OSError):
        made = kept.workplace()
        link_tree(folder, made)
        kept.keep(wanted.text, made)
