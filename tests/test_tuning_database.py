"""The tuning database: lasting, shared between processes, exported and merged, and clear about what it lacks."""

from __future__ import annotations

import json
import math
import multiprocessing
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sylvester.__main__ import main
from sylvester.backends.tuning_database import SCHEMA, Database, DatabaseError, Entry, Key, Time
from sylvester.backends.tuning_exchange import FORMAT, explain, export, merge

KEY = Key("hash", "linear f32 1x768x768 f32", "cpu avx2", 2, "zig 1")
WRITERS, WRITES = 3, 20


def entry(key: Key = KEY, chosen: str = "A=1", at: str = "2026-01-01T00:00:00.000+00:00", ns: int = 100) -> Entry:
    return Entry(key, chosen, True, 0.03, {"A=1": Time(ns, (ns, ns + 1)), "default": Time(200, (200,), True)}, at)


def test_entry_survives_reopening(tmp_path):
    with Database(tmp_path / "deep" / "t.sqlite") as database:
        database.record(entry())

    with Database(tmp_path / "deep" / "t.sqlite") as database:
        assert database.look_up(KEY) == entry()
        assert database.look_up(replace(KEY, threads=1)) is None


def test_second_record_replaces_and_keeps_other_candidates(tmp_path):
    with Database(tmp_path / "t.sqlite") as database:
        database.record(entry())
        database.record(replace(entry(), chosen="B=1", times={"B=1": Time(50, (50,))}))

        found = database.look_up(KEY)

    assert found is not None
    assert found.chosen == "B=1"
    assert list(found.times) == ["B=1", "A=1", "default"]


def _write(path: Path, writer: int) -> None:
    for turn in range(WRITES):
        with Database(path) as database:
            database.record(entry(replace(KEY, threads=turn), at=f"{writer}"))
            database.record(entry(replace(KEY, threads=1000 * (writer + 1) + turn)))


def test_processes_may_write_at_once(tmp_path):
    path, context = tmp_path / "t.sqlite", multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, n)) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)

    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    with Database(path) as database:
        threads = sorted(e.key.threads for e in database.entries())
    assert threads == sorted([*range(WRITES), *(1000 * (w + 1) + t for w in range(WRITERS) for t in range(WRITES))])


def test_export_and_merge_round_trip(tmp_path):
    other = replace(KEY, problem="linear q8 4x64x64 f32")
    with Database(tmp_path / "a.sqlite") as source:
        source.record(entry())
        source.record(entry(other))
        assert export(source, tmp_path / "e.json") == 2

    with Database(tmp_path / "b.sqlite") as target:
        assert merge(target, tmp_path / "e.json") == 2
        assert merge(target, tmp_path / "e.json") == 0
        assert target.look_up(KEY) == entry()
        assert target.look_up(other) == entry(other)


@pytest.mark.parametrize(("mine", "kept"), [("2025", "A=9"), ("2027", "A=1")])
def test_merge_takes_the_younger(tmp_path, mine, kept):
    with Database(tmp_path / "a.sqlite") as source:
        source.record(entry(chosen="A=9"))
        export(source, tmp_path / "e.json")

    with Database(tmp_path / "b.sqlite") as target:
        target.record(entry(at=mine))
        merge(target, tmp_path / "e.json")
        found = target.look_up(KEY)

    assert found is not None
    assert found.chosen == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "is not an export of this version"),
        ('{"format": "sylvester tuning 9", "entries": []}', "is not an export of this version"),
        ('{"format": "sylvester tuning 1", "entries": [{"key": {}}]}', "has a damaged entry"),
        ('{"format": "sylvester tuning 1"}', "has a damaged entry"),
    ],
)
def test_foreign_files_are_refused_and_nothing_is_taken(tmp_path, text, message):
    path = tmp_path / "e.json"
    path.write_text(text)

    with Database(tmp_path / "t.sqlite") as database:
        with pytest.raises(DatabaseError, match=message) as error:
            merge(database, path)
        assert database.entries() == []
    assert "e.json" in error.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"margin": math.nan},
        {"margin": math.inf},
        {"chosen": "\ud800"},
        {"times": {"default": {"median": 1 << 70, "samples": [], "dropped": False}}},
        {"times": {"default": {"median": math.inf, "samples": [], "dropped": False}}},
        {"times": {"default": {"median": 1, "samples": [-1], "dropped": False}}},
    ],
    ids=str,
)
def test_values_no_race_can_give_are_refused_and_nothing_is_taken(tmp_path, change):
    good = asdict(entry())
    damaged = {**good, "key": {**good["key"], "threads": 3}, **change}
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"format": FORMAT, "entries": [good, damaged]}))

    with Database(tmp_path / "t.sqlite") as database:
        with pytest.raises(DatabaseError, match="has a damaged entry"):
            merge(database, path)
        assert database.entries() == []


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({}, "A=1, measured 2026-01-01"),
        ({"kernel": "new"}, "missed: kernel source changed"),
        ({"threads": 4}, "missed: other threads: 2, asked 4"),
        ({"target": "cpu avx512"}, "missed: other CPU or variant: cpu avx2, asked cpu avx512"),
        ({"toolchain": "zig 2", "kernel": "new"}, "missed: kernel source changed; other compiler: zig 1, asked zig 2"),
        ({"problem": "linear f32 4x768x768 f32"}, "never measured: the nearest entry is linear f32 1x768x768 f32"),
        ({"problem": "linear q8 4x64x64 f32"}, "never measured: the nearest entry is linear q8 1x64x64 f32"),
    ],
)
def test_explain_names_the_part_that_differs(tmp_path, asked, answer):
    with Database(tmp_path / "t.sqlite") as database:
        database.record(entry(replace(KEY, kernel="old", threads=7, target="x")))
        database.record(entry())
        database.record(entry(replace(KEY, problem="linear q8 1x64x64 f32")))

        text = explain(database, replace(KEY, **asked))

    assert answer in text
    assert text.startswith(asked.get("problem", KEY.problem))


def test_explain_of_an_empty_database(tmp_path):
    with Database(tmp_path / "t.sqlite") as database:
        assert explain(database, KEY).endswith("never measured: the database is empty")


def test_corrupt_file_is_named_and_left_alone(tmp_path):
    path = tmp_path / "t.sqlite"
    path.write_bytes(b"garbage" * 500)

    with pytest.raises(DatabaseError, match=r"cannot use the tuning database '.*t\.sqlite'") as error:
        Database(path)

    assert "move or restore the file" in error.value.hint
    assert path.read_bytes() == b"garbage" * 500


def test_database_of_another_schema_is_named_and_left_alone(tmp_path):
    path = tmp_path / "t.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE entries (other TEXT); PRAGMA user_version = 7;")
    connection.close()
    before = path.read_bytes()

    with pytest.raises(DatabaseError, match=f"schema version 7, this version uses {SCHEMA}"):
        Database(path)

    assert path.read_bytes() == before


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(DatabaseError, match="cannot use the tuning database"):
        Database(tmp_path / "file" / "t.sqlite")


def test_a_place_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "t #1.sqlite"
    with Database(path) as database:
        database.record(entry())
    monkeypatch.setattr("os.access", lambda *_: False)

    with Database(path) as database:
        assert database.look_up(KEY) == entry()
        with pytest.raises(DatabaseError, match="readonly"):
            database.record(entry(chosen="default"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_commands_export_merge_and_explain(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path))
    with Database(tmp_path / "tuning.sqlite") as database:
        database.record(entry())

    assert main(["tune", "--export", str(tmp_path / "e.json"), "--json"]) == 0
    assert main(["tune", "--merge", str(tmp_path / "e.json"), "--json"]) == 0
    assert main(["tune"]) == 2

    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == [{"file": str(tmp_path / "e.json"), "entries": 1}]
    assert second == [{"file": str(tmp_path / "e.json"), "taken": 0}]
