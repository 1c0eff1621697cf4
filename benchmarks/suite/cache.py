"""Files that are made once: written under a temporary name by a process of its own, then renamed."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cached(path: Path, make: Callable[..., None], *args: Any) -> Path:
    """`path`, after `make(temporary path, *args)` if it is not there; `make` must be importable.

    The process of its own gives the memory of an export back.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".making-{path.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    process = multiprocessing.get_context("spawn").Process(target=make, args=(folder / path.name, *args))
    process.start()
    process.join()
    if process.exitcode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(f"{make.__module__}.{make.__name__} ended with code {process.exitcode} for {path.name}")
    for made in sorted(folder.iterdir(), key=lambda p: p == folder / path.name):
        made.rename(path.parent / made.name)
    folder.rmdir()
    return path
