"""Finding a compiler and building with it: what is missing or wrong is said, and no half-built file is left."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

from sylvester.backends import toolchain
from sylvester.backends.toolchain import BuildFailed, Compiler, ToolchainMissing, build_shared, find_compiler, version
from sylvester.codegen.isa import AMX, AVX512, DOTPROD, NEON, SCALAR, Isa
from sylvester.compiler.target import host_architecture

ANSWER = '__attribute__((visibility("default"))) int answer(void) { return 42; }\nint hidden(void) { return 1; }\n'


def test_builds_and_exports_only_what_is_marked(tmp_path):
    lib = ctypes.CDLL(str(build_shared(ANSWER, tmp_path / "deep" / "answer.so", SCALAR)))

    assert lib.answer() == 42
    assert not hasattr(lib, "hidden")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["answer.so"]


def test_a_refused_source_shows_the_messages_and_leaves_nothing(tmp_path):
    with pytest.raises(BuildFailed, match="undeclared_name"):
        build_shared("int f(void) { return undeclared_name; }", tmp_path / "bad.so", SCALAR)

    assert not list(tmp_path.iterdir())


def test_a_named_compiler_that_is_not_there():
    with pytest.raises(ToolchainMissing, match="no-such-cc"):
        find_compiler("no-such-cc")


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)

    with pytest.raises(ToolchainMissing, match="ziglang, clang and gcc") as caught:
        find_compiler("")

    assert caught.value.hint == "pip install ziglang"


def test_ziglang_comes_first(monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: name)

    assert find_compiler("").family == "zig"


@pytest.mark.parametrize(
    ("isa", "machine", "target"),
    [
        (SCALAR, "x86_64", "x86_64-linux-gnu.2.17"),
        (AVX512, "x86_64_v4", "x86_64-linux-gnu.2.17"),
        (AMX, "x86_64_v4+avx512vnni+avx512bf16+amx_tile+amx_int8+amx_bf16", "x86_64-linux-gnu.2.17"),
        (NEON, "generic", "aarch64-linux-gnu.2.17"),
        (DOTPROD, "generic+v8_2a+dotprod+fullfp16", "aarch64-linux-gnu.2.17"),
    ],
    ids=lambda value: value.name if isinstance(value, Isa) else "",
)
def test_zig_spells_machines_its_own_way(isa, machine, target):
    arguments = Compiler(("zig", "cc"), "zig").arguments(isa)

    assert f"-march={machine}" in arguments
    assert target in arguments


def test_other_compilers_take_the_plain_names():
    assert "-march=x86-64-v4" in Compiler(("gcc",), "gcc").arguments(AVX512)
    assert {"-march=x86-64-v4", "-mavx512vnni", "-mamx-tile"} <= set(Compiler(("gcc",), "gcc").arguments(AMX))
    assert "-march=armv8.2-a+dotprod+fp16" in Compiler(("gcc",), "gcc").arguments(DOTPROD)


def foreign() -> str:
    return next(name for name in ("aarch64", "x86_64") if name != host_architecture())


def test_only_ziglang_is_found_for_another_architecture(monkeypatch):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: name)

    assert find_compiler("", foreign()).family == "zig"
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(ToolchainMissing, match=f"no C compiler for {foreign()}") as caught:
        find_compiler("", foreign())

    assert "SYLVESTER_CC" in caught.value.hint


@pytest.mark.parametrize(
    ("triple", "fits"), [("aarch64-none-linux-gnu", True), ("x86_64-linux-gnu", False), ("", False)]
)
def test_a_named_compiler_says_what_it_builds_for(tmp_path, triple, fits):
    named = tmp_path / "some-gcc"
    named.write_text(f"#!/bin/sh\necho {triple}\n")
    named.chmod(0o755)

    if fits:
        assert find_compiler(str(named), "aarch64") == Compiler((str(named),), "gcc")
    else:
        with pytest.raises(ToolchainMissing, match="expected aarch64"):
            find_compiler(str(named), "aarch64")


def test_no_flag_relaxes_arithmetic():
    flags = Compiler(("gcc",), "gcc").arguments(AVX512)

    assert not [flag for flag in flags if "fast-math" in flag or "finite" in flag or "associative" in flag]


def test_words_after_the_compiler_are_part_of_its_version():
    gcc = Compiler(("gcc",), "gcc")
    assert version(replace(gcc, command=("gcc", "-O0"))) == f"{version(gcc)} -O0"

    assert find_compiler(" ") == find_compiler("")
    zig = find_compiler("ziglang -fno-builtin")
    assert zig.command[-1] == "-fno-builtin"
    assert version(zig) == f"{version(find_compiler('ziglang'))} -fno-builtin"
