"""Which variant of an artefact is loaded: by level, by permission, by the knob; never one of another machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from sylvester.backends.cpu_library import choose
from sylvester.backends.toolchain import build_shared
from sylvester.codegen import isa as isas
from sylvester.compiler import knobs
from sylvester.compiler.errors import ArtefactError, Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.target import host_architecture

BASELINE = isas.of(host_architecture())[0]
SOURCE = """
#define API __attribute__((visibility("default")))
API int sv_abi(void) {{ return 0; }}
API int sv_isa_level(void) {{ return {level}; }}
API int sv_permit_tiles(void) {{ return {refused}; }}
"""

pytestmark = pytest.mark.skipif(host_architecture() != "x86_64", reason="names the variants of x86")


def folder(root: Path, level: int, refused: bool = False) -> Path:
    """An artefact on a CPU of this level; only the baseline has code, as nothing else is loaded to choose."""
    build_shared(SOURCE.format(level=level, refused=-int(refused)), root / "code" / "scalar.so", BASELINE)
    return root


def manifest(*names: str, arch: str = "x86_64") -> Manifest:
    return Manifest("cpu", {}, isas=names, arch=arch)


@pytest.mark.parametrize(
    ("level", "carried", "chosen"),
    [
        (0, ("scalar", "avx2", "avx512"), "scalar"),
        (1, ("scalar", "avx2", "avx512"), "avx2"),
        (5, ("scalar", "avx2", "avx512"), "avx512"),
        (4, ("scalar", "avx512", "vnni", "amx"), "vnni"),
        (3, ("scalar", "avx512", "bf16", "amx"), "avx512"),
        (5, ("scalar", "avx512", "vnni", "amx"), "amx"),
        (5, ("amx", "vnni", "scalar"), "amx"),
    ],
)
def test_best_variant_the_cpu_has(tmp_path, level, carried, chosen):
    choice = choose(folder(tmp_path, level), manifest(*carried))

    assert (choice.path, choice.notes) == (tmp_path / "code" / f"{chosen}.so", ())


def test_refused_permission_is_said_and_the_next_variant_taken(tmp_path):
    choice = choose(folder(tmp_path, 5, refused=True), manifest("scalar", "vnni", "amx"))

    assert choice.path.stem == "vnni"
    assert choice.notes == ("amx is not used: the kernel refused this process the AMX tile registers",)


def test_forced_variant(tmp_path, monkeypatch):
    monkeypatch.setenv(knobs.ISA.name, "avx2")

    assert choose(folder(tmp_path, 5), manifest("scalar", "avx2", "amx")).path.stem == "avx2"


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("avx1024", "SYLVESTER_ISA='avx1024', but the artefact has ['scalar', 'vnni', 'amx']"),
        ("avx2", "SYLVESTER_ISA='avx2', but the artefact has ['scalar', 'vnni', 'amx']"),
        ("vnni", "SYLVESTER_ISA='vnni', but this CPU has avx2 at most"),
    ],
)
def test_forced_variant_that_cannot_be(tmp_path, monkeypatch, forced, message):
    monkeypatch.setenv(knobs.ISA.name, forced)

    with pytest.raises(Unsupported) as caught:
        choose(folder(tmp_path, 1), manifest("scalar", "vnni", "amx"))

    assert caught.value.message == message


def test_forced_variant_without_permission(tmp_path, monkeypatch):
    monkeypatch.setenv(knobs.ISA.name, "amx")

    with pytest.raises(Unsupported, match="the kernel refused this process") as caught:
        choose(folder(tmp_path, 5, refused=True), manifest("scalar", "amx"))

    assert "unset SYLVESTER_ISA" in caught.value.hint


def test_nothing_fits(tmp_path):
    with pytest.raises(Unsupported, match=r"this CPU has scalar at most, the artefact has \['avx2'\]"):
        choose(folder(tmp_path, 0), manifest("avx2"))


def test_another_architecture_is_refused_before_code_is_loaded(tmp_path):
    with pytest.raises(ArtefactError, match="the artefact is for aarch64, this machine is x86_64") as caught:
        choose(tmp_path, manifest("neon", arch="aarch64"))

    assert "x86_64" in caught.value.hint
