"""Which variants an artefact carries, and what a CPU is said to run, from made-up registers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sylvester.codegen import isa as isas
from sylvester.codegen.isa import AMX, AVX2, AVX512, BF16, DOTPROD, NEON, SCALAR, VNNI
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.target import Target, host_architecture
from tests.kernel_harness import export, load, run, supported, team

SOURCE = export(
    "x86",
    "const int64_t *r = p[0]; sv_cpuid id = {(uint32_t)r[0], (uint32_t)r[1], (uint32_t)r[2], (uint32_t)r[3], "
    "(uint32_t)r[4], (uint32_t)r[5], (uint32_t)r[6]}; *(int64_t *)p[1] = sv_x86_level(&id);",
) + export("arm", "*(int64_t *)p[0] = sv_arm_level((uint64_t)i[0]);")
REGISTERS = ("leaf1_c", "leaf7_b", "leaf7_c", "leaf7_d", "leaf7_1_a", "extended_c", "enabled")


def bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


SSE4 = {"leaf1_c": bits(0, 9, 13, 19, 20, 23, 27), "enabled": bits(0, 1)}
HASWELL = {
    "leaf1_c": SSE4["leaf1_c"] | bits(12, 22, 28, 29),
    "leaf7_b": bits(3, 5, 8),
    "extended_c": bits(5),
    "enabled": bits(0, 1, 2),
}
SKYLAKE = HASWELL | {"leaf7_b": HASWELL["leaf7_b"] | bits(16, 17, 28, 30, 31), "enabled": bits(0, 1, 2, 5, 6, 7)}
ICE_LAKE = SKYLAKE | {"leaf7_c": bits(11)}
ZEN4 = ICE_LAKE | {"leaf7_1_a": bits(5)}
SAPPHIRE_RAPIDS = ZEN4 | {"leaf7_d": bits(22, 24, 25), "enabled": bits(0, 1, 2, 5, 6, 7, 17, 18)}
CPUS = [
    ({}, SCALAR), (SSE4, SCALAR), (HASWELL, AVX2), (SKYLAKE, AVX512), (ICE_LAKE, VNNI), (ZEN4, BF16),
    (SAPPHIRE_RAPIDS, AMX),
]  # fmt: skip
GRAVITON2 = bits(7, 8, 9, 10, 12, 20)


def x86_level(registers: dict[str, int]) -> int:
    lib = load(SOURCE, supported()[0])
    found = np.full(1, -1, np.int64)
    with team(lib, 1) as made:
        assert run(lib, made, "x86", [], [np.array([registers.get(name, 0) for name in REGISTERS]), found]) == 0
    return int(found[0])


@pytest.mark.parametrize(("registers", "isa"), CPUS, ids=lambda value: getattr(value, "name", ""))
def test_level_of_a_cpu(registers, isa):
    assert x86_level(registers) == isa.level


@pytest.mark.parametrize(
    ("cpu", "enabled", "isa"),
    [
        (HASWELL, bits(0, 1), SCALAR),
        (SAPPHIRE_RAPIDS, bits(0, 1, 2), AVX2),
        (SAPPHIRE_RAPIDS, bits(0, 1, 2, 5, 6), AVX2),
        (SAPPHIRE_RAPIDS, bits(0, 1, 2, 5, 6, 7), BF16),
        (SAPPHIRE_RAPIDS, bits(0, 1, 2, 5, 6, 7, 17), BF16),
    ],
)
def test_registers_the_system_does_not_save_are_not_used(cpu, enabled, isa):
    assert x86_level(cpu | {"enabled": enabled}) == isa.level


@pytest.mark.parametrize("register", REGISTERS)
def test_every_needed_bit_is_needed(register):
    """Without any one bit that the best CPU has, its level is lower."""
    for bit in range(32):
        if SAPPHIRE_RAPIDS[register] >> bit & 1 and (register, bit) != ("enabled", 0):
            assert x86_level(SAPPHIRE_RAPIDS | {register: SAPPHIRE_RAPIDS[register] & ~(1 << bit)}) < AMX.level, bit


def test_level_of_an_arm_cpu():
    lib = load(SOURCE, supported()[0])
    for features, isa in [
        (0, NEON),
        (GRAVITON2, DOTPROD),
        *((GRAVITON2 & ~(1 << b), NEON) for b in (7, 8, 9, 10, 12, 20)),
    ]:
        found = np.full(1, -1, np.int64)
        with team(lib, 1) as made:
            assert run(lib, made, "arm", [features], [found]) == 0
        assert found[0] == isa.level


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads the flags of an x86 CPU")
def test_this_cpu_is_what_the_kernel_says():
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    level = load("", SCALAR).sv_isa_level()

    assert (level >= AVX2.level) == ("avx2" in flags)
    assert (level >= AVX512.level) == ("avx512vl" in flags)
    assert (level >= VNNI.level) == ("avx512_vnni" in flags)
    assert (level >= BF16.level) == ("avx512_bf16" in flags)
    assert (level >= AMX.level) == ("amx_int8" in flags)


@pytest.mark.parametrize(
    ("formats", "architecture", "names"),
    [
        ((), "x86_64", ["scalar", "avx2", "avx512"]),
        (("f32",), "x86_64", ["scalar", "avx2", "avx512"]),
        (("q8",), "x86_64", ["scalar", "avx2", "avx512", "vnni", "amx"]),
        (("q4", "f32"), "x86_64", ["scalar", "avx2", "avx512", "vnni", "amx"]),
        (("q3",), "x86_64", ["scalar", "avx2", "avx512", "vnni", "amx"]),
        (("bf16",), "x86_64", ["scalar", "avx2", "avx512", "bf16", "amx"]),
        (("bf16", "q8"), "x86_64", ["scalar", "avx2", "avx512", "vnni", "bf16", "amx"]),
        (("f32",), "aarch64", ["neon"]),
        (("q8",), "aarch64", ["neon", "dotprod"]),
        (("q3",), "aarch64", ["neon", "dotprod"]),
    ],
)
def test_an_artefact_carries_what_its_formats_gain_from(formats, architecture, names):
    assert [isa.name for isa in isas.variants(formats, architecture)] == names


def test_named_variants_are_built_with_the_baseline_whatever_the_formats():
    assert isas.variants((), "x86_64", ("vnni",)) == (SCALAR, VNNI)
    assert isas.variants(("q8",), "aarch64", ("neon",)) == (NEON,)


@pytest.mark.parametrize(("architecture", "name"), [("x86_64", "dotprod"), ("aarch64", "avx2")])
def test_variants_of_another_architecture_are_unknown(architecture, name):
    with pytest.raises(Unsupported, match=f"no CPU variant named {name!r} for {architecture}"):
        isas.variants((), architecture, (name,))


def test_unknown_architecture():
    with pytest.raises(Unsupported, match="riscv64") as caught:
        isas.variants((), "riscv64")

    assert "['aarch64', 'x86_64']" in caught.value.hint


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_levels_count_up_from_a_baseline_every_cpu_runs(architecture):
    found = isas.of(architecture)

    assert [isa.level for isa in found] == list(range(len(found)))
    assert not found[0].features
    assert not found[0].formats


def test_only_tiles_need_permission():
    assert [isa.name for isa in isas.ISAS if isa.permission] == ["amx"]


def test_target_is_for_this_machine_unless_it_says_otherwise():
    assert Target("cpu").architecture == host_architecture()
    assert dataclasses.replace(Target("cpu"), arch="aarch64").architecture == "aarch64"
