"""Results kept on disk: whole or not at all, least recent use goes first, other processes are left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError
from sylvester.compiler.store import Store, link_tree, store


def put(kept: Store, key: str, size: int, used: int) -> bool:
    made = kept.workplace()
    (made / "data").write_bytes(bytes(size))
    done = kept.keep(key, made)
    if done:
        os.utime(kept.folder / key, (used, used))
    return done


def test_kept_folders_are_found_by_key(tmp_path):
    kept = Store(tmp_path / "deep", 100)

    assert kept.find("a") is None
    assert put(kept, "a", 10, 0)
    assert (kept.find("a") / "data").read_bytes() == bytes(10)
    assert [p.name for p in kept.folder.iterdir()] == ["a"]


def test_least_recently_used_goes_first(tmp_path):
    kept = Store(tmp_path, 100)
    for number, key in enumerate("abc"):
        put(kept, key, 30, number)
    kept.find("a")

    put(kept, "d", 30, 10**10)

    assert set(kept.sizes()) == {"a", "c", "d"}


def test_what_would_throw_out_the_rest_is_not_kept(tmp_path):
    kept = Store(tmp_path, 100)
    put(kept, "a", 30, 0)

    assert not put(kept, "large", 51, 1)
    assert kept.sizes() == {"a": 30}


def test_the_first_of_two_wins(tmp_path):
    kept = Store(tmp_path, 100)
    put(kept, "a", 10, 0)

    assert put(kept, "a", 20, 1)
    assert kept.sizes() == {"a": 10}


def test_without_room_nothing_is_found(tmp_path):
    put(Store(tmp_path, 100), "a", 10, 0)

    assert Store(tmp_path, 0).find("a") is None


def test_dropped_entries_are_gone(tmp_path):
    kept = Store(tmp_path, 100)
    put(kept, "a", 10, 0)

    kept.drop("a")
    kept.drop("a")

    assert list(tmp_path.iterdir()) == []


def test_workplaces_of_dead_processes_are_cleared_and_no_others(tmp_path):
    kept, code = (
        Store(tmp_path, 100),
        "import sys; from sylvester.compiler.store import Store; from pathlib import Path;",
    )
    code += "print(Store(Path(sys.argv[1]), 100).workplace().name)"
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    mine, elsewhere = kept.workplace(), tmp_path / ".work-1@another-host-xyz"
    elsewhere.mkdir()

    put(kept, "a", 10, 0)

    assert not (tmp_path / dead.stdout.strip()).exists()
    assert mine.is_dir()
    assert elsewhere.is_dir()


def test_linked_trees_share_their_files(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "file").write_text("text")

    link_tree(tmp_path / "a", tmp_path / "b")

    assert (tmp_path / "b" / "deep" / "file").samefile(tmp_path / "a" / "deep" / "file")


def test_the_knob_sets_the_room(monkeypatch, tmp_path):
    monkeypatch.setenv(knobs.CACHE.name, str(tmp_path))
    monkeypatch.setenv(knobs.CACHE_SIZE.name, "10")

    assert store("code") == Store(tmp_path / "kept" / "code", 3_333_333)


def test_room_that_is_no_number(monkeypatch):
    monkeypatch.setenv(knobs.CACHE_SIZE.name, "lots")

    with pytest.raises(CompileError, match="must be a number of megabytes, found 'lots'"):
        store("code")
