"""Artefact folders: load one into something callable, and put one in its place in a single step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from sylvester.compiler.errors import CompileError
from sylvester.compiler.knobs import require_threads
from sylvester.compiler.manifest import NAME, PRODUCER, REPORT, Manifest, read, read_verified
from sylvester.compiler.registry import loader
from sylvester.compiler.runner import Runner, RunsElsewhere
from sylvester.compiler.target import host_architecture


def open_runner(folder: Path, threads: int | None = None) -> Runner:
    """Check every file, then load the code with the loader of the artefact's target."""
    if threads is not None:
        require_threads(threads)
    manifest = read_verified(folder)
    return cast(Runner, loader(manifest.target)(folder, manifest, threads))


def placeholder(folder: Path) -> Runner | None:
    """What stands for the code of an artefact just built for another architecture; None when it runs here."""
    manifest = read(folder)
    return RunsElsewhere(manifest) if manifest.arch not in ("", host_architecture()) else None


def read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    return cast("dict[str, Any]", json.loads(path.read_bytes())) if path.is_file() else {}


def check_destination(folder: Path) -> None:
    """Refuse, before long work, a place an artefact cannot be put: not writable, a file, or someone else's folder."""
    parent = _existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CompileError(f"cannot write to {str(parent)!r}", hint="choose an output folder you may write to")
    if folder.exists() and not folder.is_dir():
        raise CompileError(
            f"{str(folder)!r} is a file, expected a folder or nothing", hint="choose another output folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not _is_artefact(folder):
        found = sorted(p.name for p in folder.iterdir())[0]
        raise CompileError(
            f"{str(folder)!r} is not empty and not an artefact: it has {found!r}", hint="choose an empty folder"
        )


def copy_to(source: Path, folder: Path) -> None:
    """Copy an artefact to `folder`, replacing an older one: readers see the old, then the new, nothing in between."""
    folder = Path(os.path.abspath(folder))
    check_destination(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            fresh, old = Path(work) / "new", Path(work) / "old"
            shutil.copytree(source, fresh)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
    except OSError as error:
        raise CompileError(
            f"cannot write {str(folder)!r}: {error.strerror or error}", hint="choose another output folder"
        ) from error


def _existing_parent(folder: Path) -> Path:
    parents = [p for p in Path(os.path.abspath(folder)).parents if p.exists()]
    return parents[0]


def _is_artefact(folder: Path) -> bool:
    try:
        data = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("producer") == PRODUCER


def describe(manifest: Manifest) -> str:
    """One line per entry: its inputs and outputs."""
    lines = []
    for name, entry in manifest.entries.items():
        inputs = ", ".join(f"{s.name}: {s.dtype}{list(s.shape)}" for s in entry.inputs)
        outputs = ", ".join(f"{s.name}: {s.dtype}{list(s.shape)}" for s in entry.outputs)
        lines.append(f"{name}({inputs}) -> ({outputs})")
    return "\n".join(lines)
