"""Tuning results as a JSON file, to bring them to another machine of the same kind; and why a look-up missed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sylvester.backends.tuning_database import Database, DatabaseError, Entry, Key, Time

FORMAT = "sylvester tuning 1"
NAMES = {"target": "CPU or variant", "threads": "threads", "toolchain": "compiler"}


def export(database: Database, path: Path) -> int:
    """Write all entries to a JSON file; returns how many."""
    entries = database.entries()
    text = json.dumps({"format": FORMAT, "entries": [asdict(e) for e in entries]}, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DatabaseError(f"cannot write {str(path)!r}: {error.strerror}", hint="choose another file") from error
    return len(entries)


def merge(database: Database, path: Path) -> int:
    """Take over the entries of an exported file that are new or younger; returns how many."""
    taken = 0
    for entry in _read(path):
        known = database.look_up(entry.key)
        if known is None or known.at < entry.at:
            database.record(entry)
            taken += 1
    return taken


def explain(database: Database, key: Key) -> str:
    """What is known for a key; when nothing is, which parts of the key keep the nearest entry from being it."""
    found = database.look_up(key)
    if found is not None:
        state = "" if found.finished else ", unfinished"
        return f"{key.problem}: {found.chosen}, measured {found.at}{state}"
    nearest = min(database.entries(), key=lambda e: _distance(key, e.key), default=None)
    if nearest is None:
        return f"{key.problem}: never measured: the database is empty"
    if nearest.key.problem != key.problem:
        return f"{key.problem}: never measured: the nearest entry is {nearest.key.problem}"
    return f"{key.problem}: missed: {'; '.join(_reasons(key, nearest.key))}"


def _distance(key: Key, other: Key) -> tuple[int, int]:
    """Another problem is further than any other difference; the first words of a problem are its family and format."""
    mine, theirs = key.problem.split(), other.problem.split()
    unlike = sum(a != b for a, b in zip(mine, theirs, strict=False)) + abs(len(mine) - len(theirs))
    return unlike, len(key.differences(other))


def _reasons(key: Key, other: Key) -> list[str]:
    reasons = []
    for part, (asked, found) in key.differences(other).items():
        reasons.append("kernel source changed" if part == "kernel" else f"other {NAMES[part]}: {found}, asked {asked}")
    return reasons


def _read(path: Path) -> list[Entry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatabaseError(f"cannot read {str(path)!r}: {error}", hint="give a file made by the export") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DatabaseError(f"{str(path)!r} is not an export of this version", hint=f"expected format {FORMAT!r}")
    try:
        return [_entry(item) for item in data["entries"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DatabaseError(f"{str(path)!r} has a damaged entry: {error!r}", hint="export it again") from error


def _entry(item: dict[str, Any]) -> Entry:
    times = {
        _text(name): Time(_whole(t["median"]), tuple(map(_whole, t["samples"])), bool(t["dropped"]))
        for name, t in item["times"].items()
    }
    key, margin = item["key"], float(item["margin"])
    kernel, problem, target, toolchain = (_text(key[part]) for part in ("kernel", "problem", "target", "toolchain"))
    if not 0 <= margin < math.inf:
        raise ValueError(f"the margin is {margin}")
    whole = Key(kernel, problem, target, _whole(key["threads"]), toolchain)
    return Entry(whole, _text(item["chosen"]), bool(item["finished"]), margin, times, _text(item["at"]))


def _whole(value: Any) -> int:
    """A number the database can hold."""
    number = int(value)
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{number} is no count")
    return number


def _text(value: Any) -> str:
    """Characters the database can hold: `UnicodeError`, a ValueError, for halves of pairs."""
    return str(value).encode().decode()
