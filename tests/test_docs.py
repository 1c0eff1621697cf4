"""The code of the tutorial runs as it is written."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from sylvester.__main__ import main
from tests.web import NODE

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:^(?: {4}.*)?\n)*^ {4}.*\n", re.MULTILINE)
SCRIPT = {"import {": "javascript", "sylvester ": "shell"}


def blocks(page):
    """(language, text) of every indented block, in order."""
    for found in BLOCK.finditer(page):
        text = textwrap.dedent(found[0]).strip() + "\n"
        for part in re.split(r"\n(?=sylvester )", text):
            yield next((kind for start, kind in SCRIPT.items() if part.startswith(start)), "python"), part


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    ran = []
    for kind, text in blocks((ROOT / "docs/tutorial.md").read_text(encoding="utf-8")):
        ran.append(kind)
        if kind == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), names)
        elif kind == "shell":
            assert main(text.split()[1:]) == 0
        elif NODE is not None:
            Path("page.mjs").write_text(text)
            done = subprocess.run([NODE, "page.mjs"], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            assert "simd128 [ 1, 10 ]" in done.stdout
    capsys.readouterr()

    assert ran.count("python") >= 8
    assert {"shell", "javascript"} <= set(ran)
