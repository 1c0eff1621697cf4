"""Find a C compiler and build one shared library from one translation unit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sylvester.codegen.isa import Isa
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, ToolchainMissing

GLIBC = "2.17"
"""Oldest glibc a library built with zig runs on."""
_SHOWN_LINES = 20
_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-pthread")
_MATH = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


class BuildFailed(CompileError):
    """The C compiler refused a source; its first messages are in the text."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler: the command and which family of flags it takes ("zig", "clang" or "gcc")."""

    command: tuple[str, ...]
    family: str

    def arguments(self, isa: Isa) -> list[str]:
        """The command line for `isa`, without the source and the output."""
        if self.family == "zig":
            machine = ["-target", f"x86_64-linux-gnu.{GLIBC}", f"-march={isa.march.replace('-', '_')}", "-g0", "-s"]
        else:
            machine = [f"-march={isa.march}", "-Wno-psabi"]
        return [*self.command, *_FLAGS, *_MATH, *machine, *isa.flags]


def find_compiler(named: str | None = None) -> Compiler:
    """The compiler named by the caller or the knob, else ziglang, clang, gcc; ToolchainMissing when there is none."""
    named = knobs.CC.get() if named is None else named
    if named:
        return _named(named)
    if find_spec("ziglang") is not None:
        return Compiler((sys.executable, "-m", "ziglang", "cc"), "zig")
    for name in ("clang", "gcc"):
        if path := shutil.which(name):
            return Compiler((path,), name)
    raise ToolchainMissing("no C compiler: looked for ziglang, clang and gcc", hint="pip install ziglang")


def _named(named: str) -> Compiler:
    words = named.split()
    if words[0] == "ziglang":
        return Compiler((sys.executable, "-m", "ziglang", "cc"), "zig")
    path = shutil.which(words[0])
    if path is None:
        raise ToolchainMissing(f"no such compiler: {named!r}, named by {knobs.CC.name}", hint="pip install ziglang")
    name = Path(path).name
    family = "zig" if name.startswith("zig") else "clang" if "clang" in name else "gcc"
    rest = words[1:] or (["cc"] if family == "zig" else [])
    return Compiler((path, *rest), family)


def build_shared(source: str, out: Path, isa: Isa, *, compiler: Compiler | None = None) -> Path:
    """Compile C text into the shared library `out`, which appears whole or not at all."""
    compiler = compiler or find_compiler()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out.parent) as folder:
        text = Path(folder, f"{out.stem}.c")
        built = Path(folder, out.name)
        text.write_text(source, encoding="utf-8")
        _run([*compiler.arguments(isa), "-o", str(built), str(text), "-lm"], out.name)
        built.replace(out)
    return out


def _run(command: list[str], what: str) -> None:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=_environment()
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        lines = "\n".join(output.splitlines()[:_SHOWN_LINES])
        raise BuildFailed(f"{Path(command[0]).name} exited with {process.returncode} while building {what}:\n{lines}")


def _environment() -> dict[str, str]:
    """The caller's environment with zig's cache in the user's cache folder."""
    return knobs.child_environment(ZIG_GLOBAL_CACHE_DIR=str(knobs.cache_folder() / "zig"))
