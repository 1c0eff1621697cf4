"""The examples run as a user runs them, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
def test_semantic_search_finds_lines_by_meaning(tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("Bread dough should rest.\nTwo waves broke over the bow.\n\nInterest rates rose.\n")

    lines = run("semantic_search.py", "a storm at sea", "--text", str(text)).splitlines()

    assert lines[0] == "closest to 'a storm at sea':"
    assert lines[1].endswith("Two waves broke over the bow.")
    assert len(lines) == 4


@pytest.mark.nightly
def test_quickstart_writes_text():
    out = run("quickstart.py")

    assert out.startswith("Once upon a time")
    assert len(out.split()) > 20


@pytest.mark.slow
def test_demo_agrees_with_eager_pytorch():
    assert "same 200 greedy tokens as eager PyTorch: yes" in run("demo.py")
