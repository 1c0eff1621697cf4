"""Results kept on disk by key: put in place whole, thrown away by least recent use, safe for several processes."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sylvester.compiler import knobs

KEPT = "kept"
WORK = ".work-"
KINDS = 3
"""Compiled code, models and finished layers share the room."""
PROCESSES = 8
"""How many may fill what is left of the room before one of them looks again."""


@dataclass(frozen=True)
class Store:
    """Folders under `folder`, one per key, with at most `limit` bytes in all; 0 keeps nothing."""

    folder: Path
    limit: int

    def find(self, key: str) -> Path | None:
        """The folder kept for a key, marked as used now; it may vanish when another process needs the room."""
        path = self.folder / key
        try:
            os.utime(path)
        except OSError:
            return None
        return path if self.limit else None

    def workplace(self) -> Path:
        """A fresh folder of this process on the same file system: files can be linked and renamed into entries."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{WORK}{os.getpid()}@{platform.node()}-", dir=self.folder))

    def keep(self, key: str, made: Path) -> bool:
        """Move a finished workplace in place under its key; False when it is not kept.

        The first of several processes wins. An entry larger than half the limit would throw out all the others.
        """
        size = _bytes(made)
        if size <= self.limit // 2:
            with suppress(OSError):
                made.rename(self.folder / key)
        shutil.rmtree(made, ignore_errors=True)
        _ROOM[self] = _ROOM.get(self, 0) - size
        if _ROOM[self] < 0:
            self._make_room()
        return (self.folder / key).is_dir()

    def drop(self, key: str) -> None:
        """Forget an entry, such as one whose files turned out to be damaged."""
        _discard(self.folder / key)

    def sizes(self) -> dict[str, int]:
        """Bytes of every entry, the least recently used first."""
        return {path.name: size for _, path, size in sorted(self._entries())}

    def _make_room(self) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, _, size in entries)
        for _, path, size in entries:
            if total <= self.limit:
                break
            _discard(path)
            total -= size
        _ROOM[self] = max(0, self.limit - total) // PROCESSES
        for path in self.folder.glob(f"{WORK}*"):
            if _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> Iterator[tuple[float, Path, int]]:
        for path in self.folder.glob("[!.]*"):
            with suppress(OSError):
                yield path.stat().st_mtime, path, _bytes(path)


_ROOM: dict[Store, int] = {}
"""Bytes that this process may keep before it looks at all entries again."""


def _discard(path: Path) -> None:
    """Take the folder out of sight in one step, then delete it."""
    gone = path.with_name(f"{WORK}{os.getpid()}@{platform.node()}-{path.name}")
    with suppress(OSError):
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _abandoned(path: Path) -> bool:
    """Whether the process that worked in this folder is gone; those of other machines are left alone."""
    process, _, rest = path.name.removeprefix(WORK).partition("@")
    here = rest.startswith(f"{platform.node()}-")
    return here and process.isdigit() and not Path("/proc", process).exists()


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def link_tree(source: Path, target: Path) -> None:
    """The same files under another folder; links where the file system has them, else copies."""
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def store(kind: str) -> Store:
    """The user's store of one kind of result, with its share of the room that the knob gives to all."""
    return Store(knobs.cache_folder() / KEPT / kind, knobs.cache_bytes() // KINDS)
