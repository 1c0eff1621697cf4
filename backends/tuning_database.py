"""What tuning has measured, in one SQLite file that several processes may write; nothing in it is ever thrown away."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError

SCHEMA = 1
BUSY_SECONDS = 30.0
TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, kernel TEXT NOT NULL, problem TEXT NOT NULL, target TEXT NOT NULL, threads INTEGER NOT NULL,
    toolchain TEXT NOT NULL, chosen TEXT NOT NULL, finished INTEGER NOT NULL, margin REAL NOT NULL, at TEXT NOT NULL,
    UNIQUE (kernel, problem, target, threads, toolchain)
);
CREATE TABLE IF NOT EXISTS times (
    entry INTEGER NOT NULL REFERENCES entries (id), candidate TEXT NOT NULL, median INTEGER NOT NULL,
    samples TEXT NOT NULL, dropped INTEGER NOT NULL, PRIMARY KEY (entry, candidate)
);
"""
Result = TypeVar("Result")


class DatabaseError(CompileError):
    """The tuning database cannot be used; the message names the file, the hint says what to do."""


@dataclass(frozen=True)
class Key:
    """What a measurement holds for: hash of the kernel's text, problem, CPU and variant, threads, compiler."""

    kernel: str
    problem: str
    target: str
    threads: int
    toolchain: str

    def differences(self, other: Key) -> dict[str, tuple[str, str]]:
        """Part -> its value here and in the other key."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (str(mine[name]), str(theirs[name])) for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True)
class Time:
    """Median nanoseconds of one candidate, every run, and whether the race left it behind."""

    median: int
    samples: tuple[int, ...]
    dropped: bool = False


@dataclass(frozen=True)
class Entry:
    """The race of one problem. `finished` false: the time ran out first. `margin`: the gain that would have counted."""

    key: Key
    chosen: str
    finished: bool
    margin: float
    times: Mapping[str, Time]
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class Database:
    """One open connection; close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            name = f"{path.absolute().as_uri()}{_mode(path)}"
            self._connection = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None, uri=True)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def look_up(self, key: Key) -> Entry | None:
        """The entry of exactly this key."""
        where = " AND ".join(f"{f.name} = ?" for f in fields(Key))
        return next(iter(self._guarded(lambda: self._select(f"WHERE {where}", tuple(asdict(key).values())))), None)

    def entries(self) -> list[Entry]:
        return self._guarded(lambda: self._select("ORDER BY id", ()))

    def record(self, entry: Entry) -> None:
        """Add the entry, or replace what it says of its candidates; on disk when this returns."""
        with self._transaction():
            values = (*asdict(entry.key).values(), entry.chosen, entry.finished, entry.margin, entry.at)
            ((number,),) = self._connection.execute(
                "INSERT INTO entries (kernel, problem, target, threads, toolchain, chosen, finished, margin, at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET chosen = excluded.chosen, "
                "finished = excluded.finished, margin = excluded.margin, at = excluded.at RETURNING id",
                values,
            ).fetchall()
            self._connection.executemany(
                "INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?, ?)",
                [(number, c, t.median, json.dumps(t.samples), t.dropped) for c, t in entry.times.items()],
            )

    def _select(self, clause: str, values: tuple[object, ...]) -> list[Entry]:
        columns = "id, kernel, problem, target, threads, toolchain, chosen, finished, margin, at"
        rows = self._connection.execute(f"SELECT {columns} FROM entries {clause}", values).fetchall()
        return [Entry(Key(*row[1:6]), row[6], bool(row[7]), row[8], self._times(row[0]), row[9]) for row in rows]

    def _times(self, number: int) -> dict[str, Time]:
        rows = self._connection.execute(
            "SELECT candidate, median, samples, dropped FROM times WHERE entry = ? ORDER BY median, candidate",
            (number,),
        )
        return {name: Time(median, tuple(json.loads(samples)), bool(gone)) for name, median, samples, gone in rows}

    def _prepare(self) -> None:
        """Set up a new file; refuse one that is not ours, leaving it as it is."""
        # Tables and version appear at once, so the version that is read last belongs to the tables.
        tables = self._guarded(lambda: self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        found = self._guarded(lambda: self._connection.execute("PRAGMA user_version").fetchone()[0])
        if found not in (0, SCHEMA) or (found == 0 and tables):
            raise DatabaseError(
                f"the tuning database {str(self.path)!r} has schema version {found}, this version uses {SCHEMA}",
                hint=f"move the file away, or name another cache folder by {knobs.CACHE.name}; it is left as it is",
            )
        self._guarded(lambda: self._connection.execute("PRAGMA journal_mode = WAL").fetchone())
        if found == 0:
            with self._transaction():
                for statement in TABLES.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Writes that appear together or not at all, also when the process is interrupted."""
        self._guarded(lambda: self._connection.execute("BEGIN IMMEDIATE"))
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._connection.rollback()
            if isinstance(error, sqlite3.Error):
                raise self._unusable(error) from error
            raise

    def _guarded(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except (sqlite3.Error, ValueError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> DatabaseError:
        return DatabaseError(
            f"cannot use the tuning database {str(self.path)!r}: {error}",
            hint=f"move or restore the file; {knobs.CACHE.name} names another folder, {knobs.TUNE.name}=0 does without",
        )


def _mode(path: Path) -> str:
    """A file in a place that cannot be written to, as in an image, is read as it is: SQLite would want to lock it."""
    writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    return "" if writable else "?immutable=1"


def default_path() -> Path:
    """The database of this user."""
    return knobs.cache_folder() / "tuning.sqlite"
