"""A Triton function with all that is fixed when it is compiled, and the text that it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import resources

IMPORT = re.compile(r"^from sylvester\.codegen\.triton\.(\w+) import [^\n(]+\n", re.MULTILINE)
Constant = int | float | str | bool


@dataclass(frozen=True)
class Kernel:
    """`function` of `text` for arguments of these types, as Triton writes them: "*bf16", "i32", "fp32".

    `constants` are its other parameters. `aligned` are arguments that are multiples of 16: addresses or sizes.
    """

    text: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Constant]
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3

    @property
    def key(self) -> str:
        """What tells it from others."""
        fixed = (dict(self.types), dict(self.constants), self.aligned, self.warps, self.stages)
        return sha256(f"{self.text}\n{self.function} {fixed}".encode()).hexdigest()


def paired(kernel: Kernel, apart: tuple[str, ...]) -> Kernel:
    """Two launches of a kernel in one: of the arguments `apart` there are others, right after each, for the second."""
    types: dict[str, str] = {}
    for name, held in kernel.types.items():
        types |= dict.fromkeys((name, *([f"other_{name}"] if name in apart else [])), held)
    fixed = {name: value for name, value in kernel.constants.items() if name not in types}
    return replace(kernel, types=types, constants={**fixed, "PAIRED": True})


def alone(apart: tuple[str, ...]) -> dict[str, Constant]:
    """Constants of a kernel that can be `paired`, and is not."""
    return {**dict.fromkeys((f"other_{name}" for name in apart), 0), "PAIRED": False}


ALL_REDUCE = Kernel("", "all_reduce", {"y": "*fp32", "n": "i32"}, {})
"""No kernel: n numbers become their sums over ranks, which the host asks for."""


@cache
def text(name: str) -> str:
    """The text of one file of codegen/triton, after those of the files that it imports."""
    parts: dict[str, str] = {}
    _gather(name, parts)
    return "\n".join(parts.values())


def _gather(name: str, parts: dict[str, str]) -> None:
    found = resources.files("sylvester.codegen").joinpath("triton", f"{name}.py").read_text(encoding="utf-8")
    for other in IMPORT.findall(found):
        if other not in parts:
            _gather(other, parts)
    parts[name] = IMPORT.sub("", found)
