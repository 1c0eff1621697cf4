"""Libraries kept in the cache folder by what they were built from."""

from __future__ import annotations

import shutil
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from sylvester.compiler.store import store

KIND = "code"
LIBRARY, SUM = "library.so", "sha256"


def built_before(key: str, out: Path) -> bool:
    """Copy the library kept under a key to `out`; False when there is none, or only a damaged one, which is dropped."""
    kept = store(KIND)
    entry = kept.find(key)
    if entry is None:
        return False
    with suppress(OSError):
        shutil.copyfile(entry / LIBRARY, out)
        if _sum(out) == (entry / SUM).read_text(encoding="ascii"):
            return True
    out.unlink(missing_ok=True)
    kept.drop(key)
    return False


def keep(key: str, library: Path) -> None:
    """Keep a library for later builds; a cache folder that cannot be written is no reason to fail."""
    kept = store(KIND)
    if not kept.limit:
        return
    with suppress(OSError):
        entry = kept.workplace()
        shutil.copyfile(library, entry / LIBRARY)
        (entry / SUM).write_text(_sum(library), encoding="ascii")
        kept.keep(key, entry)


def _sum(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
