"""Find a C compiler and build one shared library from one translation unit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from sylvester.backends.build_cache import built_before, keep
from sylvester.codegen.isa import WASM, Isa, variants
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, ToolchainMissing
from sylvester.compiler.target import host_architecture

GLIBC = "2.17"
"""Oldest glibc a library built with zig runs on."""
_SHOWN_LINES = 20
_FLAGS = ("-std=gnu11", "-O3", "-fvisibility=hidden", "-fopenmp-simd")
_SHARED = ("-fPIC", "-pthread")
_MODULE = (
    "-mexec-model=reactor",
    "-Wl,--import-memory",
    "-Wl,--export-dynamic",
    "-Wl,--export=__heap_base",
    "-Wl,--export=__stack_pointer",
    "-Wl,--export-table",
    "-Wl,--growable-table",
    "-Wl,-z,stack-size=524288",
)
"""Of WebAssembly, whose memory the page makes."""
_BESIDE = (
    "-target",
    "wasm32-freestanding",
    "-nostdlib",
    "-Wl,--no-entry",
    "-Wl,--import-memory",
    "-Wl,--export=__stack_pointer",
)
"""Of functions without data beside another module, in its memory; each thread gives them a stack."""
_THREADS = (
    "-Wl,--shared-memory",
    "-Wl,--max-memory=4294901760",
    "-Wl,--export=__wasm_init_tls",
    "-Wl,--export=__tls_size",
    "-Wl,--export=__tls_align",
)
"""Every thread has an instance, stack and thread-local data of its own over the shared memory."""
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
        if isa.architecture == WASM:
            return [*self.command, *_FLAGS, *_MATH, "-target", "wasm32-wasi", f"-mcpu={isa.zig}", "-g0", *isa.flags]
        if self.family == "zig":
            name = isa.zig or "+".join((isa.march, *isa.features)).replace("-", "_")
            machine = ["-target", f"{isa.architecture}-linux-gnu.{GLIBC}", f"-march={name}", "-g0", "-s"]
        else:
            machine = [f"-march={isa.march}", *(f"-m{name}" for name in isa.features), "-Wno-psabi"]
        return [*self.command, *_FLAGS, *_SHARED, *_MATH, *machine, *isa.flags]


def find_compiler(named: str | None = None, architecture: str = "") -> Compiler:
    """The compiler named by the caller or the knob, else ziglang, clang, gcc; ToolchainMissing when there is none.

    ziglang builds for every architecture; another compiler must be named to build for one that is not the host's.
    """
    architecture = architecture or host_architecture()
    named = (knobs.CC.get() if named is None else named).strip()
    if named:
        return _built_for(_named(named), architecture)
    if find_spec("ziglang") is not None:
        return Compiler((sys.executable, "-m", "ziglang", "cc"), "zig")
    if architecture != host_architecture():
        raise ToolchainMissing(
            f"no C compiler for {architecture} on {host_architecture()}",
            hint=f"pip install ziglang, or name a cross compiler by {knobs.CC.name}",
        )
    for name in ("clang", "gcc"):
        if path := shutil.which(name):
            return Compiler((path,), name)
    raise ToolchainMissing("no C compiler: looked for ziglang, clang and gcc", hint="pip install ziglang")


def _named(named: str) -> Compiler:
    words = named.split()
    if words[0] == "ziglang":
        return Compiler((sys.executable, "-m", "ziglang", "cc", *words[1:]), "zig")
    path = shutil.which(words[0])
    if path is None:
        raise ToolchainMissing(f"no such compiler: {named!r}, named by {knobs.CC.name}", hint="pip install ziglang")
    name = Path(path).name
    family = "zig" if name.startswith("zig") else "clang" if "clang" in name else "gcc"
    rest = words[1:] or (["cc"] if family == "zig" else [])
    return Compiler((path, *rest), family)


def _built_for(compiler: Compiler, architecture: str) -> Compiler:
    """The compiler, after it said that it builds for this architecture."""
    if compiler.family == "zig":
        return compiler
    asked = subprocess.run([*compiler.command, "-dumpmachine"], capture_output=True, text=True, check=False)
    found = asked.stdout.strip().partition("-")[0]
    if found != architecture:
        raise ToolchainMissing(
            f"{' '.join(compiler.command)!r} builds for {found or 'an unknown machine'}, expected {architecture}",
            hint=f"name a compiler for {architecture} by {knobs.CC.name}, or pip install ziglang",
        )
    return compiler


@cache
def version(compiler: Compiler) -> str:
    """What the compiler calls itself, and the words it is always given; where it is installed does not matter."""
    if compiler.command[1:3] == ("-m", "ziglang"):
        return " ".join([metadata.version("ziglang"), *compiler.command[4:]])
    try:
        shown = subprocess.run([*compiler.command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainMissing(f"cannot ask {compiler.command[0]!r} for its version: {error}") from error
    return " ".join([*(shown.stdout.splitlines() or ["unknown"])[:1], *compiler.command[1:]])


def build_shared(source: str, out: Path, isa: Isa, *, compiler: Compiler | None = None, beside: bool = False) -> Path:
    """Compile C text into the shared library `out`, which appears whole or not at all.

    The same text, compiler and flags give the library that an earlier call kept in the cache folder. `beside`: a module
    of WebAssembly that shares the memory of another.
    """
    compiler = compiler or find_compiler(architecture=isa.architecture)
    linked = _linked(isa, beside)
    flags = [*compiler.arguments(isa)[len(compiler.command) :], *linked]
    key = sha256("\0".join([source, compiler.family, version(compiler), *flags]).encode()).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out.parent) as folder:
        built = Path(folder, out.name)
        if not built_before(key, built):
            _build(source, built, isa, compiler, linked)
            keep(key, built)
        built.replace(out)
    return out


def _build(source: str, built: Path, isa: Isa, compiler: Compiler, linked: Sequence[str]) -> None:
    """Objects are linked as for the baseline: zig would build its support library anew for every instruction set."""
    text, compiled = built.with_suffix(".c"), built.with_suffix(".o")
    text.write_text(source, encoding="utf-8")
    scratch = built.with_name("zig")
    _run([*compiler.arguments(isa), "-c", "-o", str(compiled), str(text)], built.name, scratch)
    base = isa if isa.architecture == WASM else variants((), isa.architecture)[0]
    link = [*compiler.arguments(base), *linked]
    libraries = () if "-nostdlib" in linked else ("-lm",)
    _run([*link, "-o", str(built), str(compiled), *libraries], built.name, scratch)


def _linked(isa: Isa, beside: bool) -> tuple[str, ...]:
    """What makes a library, or a module, of an object."""
    if isa.architecture != WASM:
        return ("-shared",)
    shared = _THREADS if "atomics" in isa.zig else ()
    return (*_BESIDE, *shared[:2], "-s") if beside else (*_MODULE, *shared, "-s")


def _run(command: list[str], what: str, scratch: Path) -> None:
    pipe, environment = subprocess.PIPE, _environment(scratch)
    process = subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
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


def _environment(scratch: Path) -> dict[str, str]:
    """The caller's environment; zig keeps its support libraries in the user's cache folder, objects in scratch."""
    return knobs.child_environment(
        ZIG_GLOBAL_CACHE_DIR=str(knobs.cache_folder() / "zig"), ZIG_LOCAL_CACHE_DIR=str(scratch)
    )
