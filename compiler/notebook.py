"""Numbers on disk as soon as each is found, under a key that says all they depend on: interrupted work goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sylvester.compiler import knobs
from sylvester.compiler.store import store

KIND = "search"
FILE = "numbers.json"


class Notebook:
    """Lists of numbers by name. Without room in the cache folder, or with reuse off, they last only as long as this."""

    def __init__(self, about: Iterable[str]) -> None:
        self._store = store(KIND)
        self._key = digest(about)
        self.on = bool(self._store.limit) and knobs.REUSE.get() != "0"
        self.numbers: dict[str, list[float]] = {}
        self.reused = 0
        folder = self._store.find(self._key) if self.on else None
        if folder is not None:
            self.numbers = _read(folder / FILE)
            self.reused = len(self.numbers)

    def get(self, name: str) -> list[float] | None:
        return self.numbers.get(name)

    def put(self, name: str, *values: float) -> list[float]:
        """Remember, also on disk; a cache folder that cannot be written is no reason to fail."""
        self.numbers[name] = list(values)
        if self.on:
            with suppress(OSError):
                self._write()
        return self.numbers[name]

    def _write(self) -> None:
        text = json.dumps(self.numbers)
        folder = self._store.find(self._key)
        if folder is None:
            made = self._store.workplace()
            (made / FILE).write_text(text, encoding="utf-8")
            self._store.keep(self._key, made)
            return
        new = folder / f".{FILE}.{os.getpid()}"
        new.write_text(text, encoding="utf-8")
        new.replace(folder / FILE)


def digest(parts: Iterable[str]) -> str:
    """One key for several texts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part.encode())
    return found.hexdigest()


def _read(path: Path) -> dict[str, list[float]]:
    """What was kept; nothing where it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        return {str(name): [float(n) for n in values] for name, values in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
