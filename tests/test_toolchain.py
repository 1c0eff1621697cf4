"""Finding a compiler and building with it: what is missing or wrong is said, and no half-built file is left."""

from __future__ import annotations

import ctypes

import pytest

from sylvester.backends import toolchain
from sylvester.backends.toolchain import BuildFailed, Compiler, ToolchainMissing, build_shared, find_compiler
from sylvester.codegen.isa import AVX512, ISAS, SCALAR

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


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_zig_spells_machines_with_underscores(isa):
    arguments = Compiler(("zig", "cc"), "zig").arguments(isa)

    assert f"-march={isa.march.replace('-', '_')}" in arguments
    assert "x86_64-linux-gnu.2.17" in arguments


def test_other_compilers_take_the_plain_name():
    assert "-march=x86-64-v4" in Compiler(("gcc",), "gcc").arguments(AVX512)


def test_no_flag_relaxes_arithmetic():
    flags = Compiler(("gcc",), "gcc").arguments(AVX512)

    assert not [flag for flag in flags if "fast-math" in flag or "finite" in flag or "associative" in flag]
