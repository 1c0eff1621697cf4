"""The code blocks of a page: how they are marked, what they may rely on, and what can be said of them without running.

A block is indented by four spaces. An HTML comment before it may say how far it is tried:

    nightly        runs with the shipped model only, by night; otherwise as `names`
    names          takes hours or what tests lack: names, attributes and arguments must be right
    output         is no code
    signature F    states the parameters of F
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sylvester import cli

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
MARKS = ("nightly", "names", "output", "signature")
BLOCK = re.compile(r"(?:^<!-- ?(?P<mark>[^\n]*?) ?-->\n\n?)?(?P<text>(?:^(?: {4}.*)?\n)*^ {4}.*\n)", re.MULTILINE)
COMMANDS = ("sylvester", "make", "pip", "python")
SCRIPT = ("import {", "const ")
STANDS_FOR = {"MODEL": "examples/models/novels-7m", "OUT": "out", "ARTEFACT": "out"}


@dataclass(frozen=True)
class Block:
    """Lines of one language: "python", "javascript" or "shell", of which each line is a block of its own."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a line of shell, placeholders filled in."""
        return [_filled(shlex.split(part, comments=True)) for part in self.text.split(" ; ")]


def _filled(words: list[str]) -> list[str]:
    return [STANDS_FOR.get(word, word) for word in words]


def blocks(page: str) -> list[Block]:
    """Every block of a page in order; a mark counts for all languages of its block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        start = text[: match.start("text")].count("\n") + 1
        if match["mark"] and match["mark"].split()[0] not in MARKS:
            raise ValueError(f"{page}:{start}: the mark {match['mark']!r} is unknown, expected one of {MARKS}")
        for offset, language, part in _parts(match["text"]):
            found.append(Block(page, start + offset, language, part, match["mark"] or ""))
    return found


def _parts(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of the parts of a block in one language."""
    language, begun, lines, blank = "", 0, [], True
    for number, line in enumerate(textwrap.dedent(text).splitlines()):
        following = _language(line, language, blank)
        if lines and (following != language or following == "shell"):
            yield begun, language, "\n".join(lines) + "\n"
            lines = []
        if not lines:
            begun = number
        language, blank = following, not line
        lines = [*lines, line] if line or lines else []
    if any(lines):
        yield begun, language, "\n".join(lines) + "\n"


def _language(line: str, current: str, blank: bool) -> str:
    if line.partition(" ")[0] in COMMANDS:
        return "shell"
    if line.startswith(SCRIPT):
        return "javascript"
    if not line or line.startswith((" ", "}", ")")) or (current == "javascript" and not blank):
        return current or "python"
    return "python"


def check_command(words: list[str]) -> None:
    """The program, module, target or extra is there, and takes these options."""
    program, *rest = words
    if program == "sylvester":
        _check_cli(rest)
    elif program == "make":
        assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text(), f"make has no target {rest[0]}"
    elif program == "python":
        spec = importlib.util.find_spec(f"{rest[1]}.__main__") if (ROOT / rest[1].replace(".", "/")).is_dir() else None
        spec = spec or importlib.util.find_spec(rest[1])
        assert spec, f"no module {rest[1]}"
        source = Path(str(spec.origin)).read_text()
        missing = [w.strip("[]") for w in rest[2:] if w.strip("[").startswith("--") and w.strip("[]") not in source]
        assert not missing, f"python -m {rest[1]} has no {missing}"
    else:
        extras = re.findall(r"sylvester\[(\w+)\]", " ".join(rest))
        known = (ROOT / "pyproject.toml").read_text()
        assert [extra for extra in extras if f"\n{extra} = [" in known], f"no extra of {extras}"


def _check_cli(words: list[str]) -> None:
    import typer

    command = typer.main.get_command(cli.app)
    name, *options = words
    found = command.commands[name]  # type: ignore[attr-defined]
    found.make_context(name, list(options))
