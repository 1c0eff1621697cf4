"""The code of every page runs as it is written: with a smaller language model here, with the shipped one by night."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import sylvester as sv
from sylvester.__main__ import main
from sylvester.cli import UsageError
from tests import docs_setting
from tests.docs_names import Names, check_signature
from tests.docs_pages import PAGES, Block, blocks, check_command
from tests.web import NODE

TUTORIAL = "docs/tutorial.md"
SERVING = ("serve",)
"""Commands that go on until they are stopped."""
PAGE = "const show = () => {{}};\n{text}\nprocess.exit();\n"


class Reader:
    """Goes through the blocks of a page, and runs those that are not for the night; or all that can be run."""

    def __init__(self, page: str, *, shipped: bool) -> None:
        self.shipped = shipped
        self.values: dict[str, Any] = {"__name__": __name__, **docs_setting.names(page)}
        self.names = Names(self.values, blocks(page))
        self.ran: list[Block] = []

    def read(self, block: Block) -> None:
        kind = block.mark.partition(" ")[0]
        if kind == "signature":
            check_signature(block)
        elif kind != "output":
            if block.language == "python":
                self.names.check(block)
            if not kind or (kind == "nightly" and self.shipped):
                self.run(block)
            elif block.language == "shell":
                self.check(block)
            elif block.language == "javascript":
                self._syntax(block)

    def run(self, block: Block) -> None:
        self.ran.append(block)
        {"python": self._python, "javascript": self._javascript, "shell": self._shell}[block.language](block)

    def _python(self, block: Block) -> None:
        exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), self.values)

    def _syntax(self, block: Block) -> None:
        Path("page.mjs").write_text(block.text)
        if NODE is not None:
            subprocess.run([NODE, "--check", "page.mjs"], check=True, timeout=60)

    def _javascript(self, block: Block) -> None:
        Path("page.mjs").write_text(PAGE.format(text=block.text))
        if NODE is None:
            return
        done = subprocess.run([NODE, "page.mjs"], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"{block.place}: {done.stderr}"

    def _shell(self, block: Block) -> None:
        for words in block.commands:
            if words[0] != "sylvester" or words[1] in SERVING:
                check_command(words)
            else:
                assert main(words[1:]) == 0, f"{block.place}: {words}"

    def check(self, block: Block) -> None:
        for words in block.commands:
            check_command(words)


def read(page: str, folder: Path, *, shipped: bool) -> list[Block]:
    """The blocks that ran."""
    docs_setting.settle(folder, shipped=shipped)
    reader = Reader(page, shipped=shipped)
    for block in blocks(page):
        reader.read(block)
    return reader.ran


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH_CODE = [page for page in PAGES if any(not b.mark.startswith("output") for b in blocks(page)) and page != TUTORIAL]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_a_page_runs(page, folder, capsys):
    ran = read(page, folder, shipped=False)
    capsys.readouterr()

    assert ran or all(block.mark for block in blocks(page))


@pytest.mark.nightly
@pytest.mark.parametrize("page", WITH_CODE)
def test_a_page_runs_with_the_shipped_model(page, folder, capsys):
    read(page, folder, shipped=True)
    capsys.readouterr()


WRONG = {
    "sv.compil(1)": "has no compil",
    "sv.compile(sv, quantise=4)": "unexpected keyword argument 'quantise'",
    "sv.compile(sv).run_it()": "has no run_it",
    "missing": "missing is not defined",
}


@pytest.mark.parametrize("text", WRONG)
def test_code_that_is_not_run_is_read(text):
    block = Block("page.md", 1, "python", text)
    with pytest.raises(AssertionError, match=WRONG[text]):
        Names({"sv": sv}, [block]).check(block)


@pytest.mark.parametrize(
    "words",
    ["sylvester compile a --passe b", "make nothing", "python -m tests.fuzz --hours 8", "pip install sylvester[c]"],
)
def test_commands_that_are_not_run_are_read(words):
    with pytest.raises((AssertionError, UsageError)):
        check_command(words.split())


def test_a_signature_that_is_out_of_date_is_found():
    with pytest.raises(AssertionError, match="takes"):
        check_signature(Block("page.md", 1, "python", "load(place)", "signature sylvester:load"))


@pytest.mark.slow
def test_the_tutorial_runs(folder, capsys):
    """All of it, with the shipped model."""
    ran = [block.language for block in read(TUTORIAL, folder, shipped=True)]
    capsys.readouterr()

    assert ran.count("python") >= 8
    assert {"shell", "javascript"} <= set(ran)
