"""Quantised caches in C: rows written as in PyTorch bit for bit, attention over records against float64."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch

from sylvester.codegen.attention import Tuning, attention, attention_header, part_floats, records_header
from sylvester.codegen.isa import Isa
from sylvester.codegen.kv_update import kv_update
from sylvester.codegen.prelude import render
from sylvester.compiler.cache_ops import BITS, dequantize_records, quantize_records, record_bytes
from tests.kernel_harness import export, load, run, strides, supported, team
from tests.test_kernels_attention import CASES, make_mask, reference

WIDTHS = (64, 7, 150)
INSTANCES = [(d, "none", bits) for d in WIDTHS for bits in BITS] + [(40, "float", 8), (7, "bool", 4)]
FEATURES = (1, 16, 33, 64, 65, 128, 150)
USED = [case for case in CASES if case[7] >= 0 and (case[6] == 0 or case[5] == case[7] + case[3])]
"""Cases that a call with a position or without one can express."""
Instance = tuple[int, str, int]


def name_of(d: int, mask: str, bits: int) -> str:
    return f"records_{d}_{mask}_{bits}"


def instance_text(d: int, mask: str, bits: int) -> str:
    """One attention with its sizes i[], operands p[] and the scale as its bits."""
    name = name_of(d, mask, bits)
    given = ", ".join([*(f"p[{n}]" for n in range(7)), *(f"i[{n}]" for n in range(22))])
    made = attention(f"a{name}", d, d, mask, cache=f"q{bits}") + render("attention_call.c.in", NAME=f"a{name}")
    cap = "sv_float((uint32_t)i[25])"
    call = f"a{name}_call(t, {given}, sv_float((uint32_t)i[22]), i[23], i[24], {cap}, p[7], NULL);"
    return made + export(name, call, f"a{name}_scratch")


UPDATES = records_header() + "".join(
    kv_update(f"update{bits}", f"q{bits}")
    + export(
        f"update{bits}", f"update{bits}_past(t, p[0], p[1], p[2], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]);"
    )
    for bits in BITS
)


def call(
    lib: ctypes.CDLL,
    made: ctypes.c_void_p,
    instance: Instance,
    case: tuple[int, ...],
    part: bool,
    softcap: float = 0.0,
) -> None:
    """One case against the reference over what the records hold."""
    d, mask_kind, bits = instance
    batch, heads, kv_heads, rows, most, keys, causal, offset, window = case
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, rows, heads, d), np.float32).swapaxes(1, 2)
    y = np.full((batch, rows, heads, d), np.nan, np.float32).swapaxes(1, 2)
    floats = [torch.from_numpy(rng.standard_normal((batch, kv_heads, most, d), np.float32)) for _ in "kv"]
    k, v = (quantize_records(x, bits) for x in floats)
    mask = make_mask(rng, mask_kind, (batch, heads, rows, keys))
    room = np.full(part_floats(d), np.nan, np.float32) if part else None
    past = np.array(offset) if causal and offset >= 0 else None
    steps = [n for x in (y, q, k.numpy(), v.numpy()) for n in strides(x, 3)]
    steps += [0] * 4 if mask is None else strides(mask, 4)
    scale, cap = (int(np.float32(x).view(np.uint32)) for x in (d**-0.5, softcap))
    sizes = [part_floats(d) if part else 0, batch, heads, kv_heads, rows, most if past is not None else keys]
    operands = [y, q, k.numpy(), v.numpy(), mask, past, room, None]
    assert run(lib, made, name_of(*instance), [*sizes, *steps, scale, causal, window, cap], operands) == 0
    expected = case if past is None else (*case[:5], offset + rows, *case[6:])
    wide = [dequantize_records(t, d, bits).numpy() for t in (k, v)]
    exact = reference(q, *wide, mask, expected, softcap)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=4e-6, err_msg=str((instance, case)))


def check_cases(
    isa: Isa, threads: int, instances: list[Instance], cases: list[tuple[int, ...]], tuning: Tuning | None = None
) -> None:
    header = attention_header(tuning) + records_header()
    lib = load(header + "".join(instance_text(*instance) for instance in instances), isa)
    with team(lib, threads) as made:
        for instance, case, part in itertools.product(instances, cases, (False, True)):
            call(lib, made, instance, case, part)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_attention_over_records(isa: Isa, threads: int) -> None:
    check_cases(isa, threads, INSTANCES, USED)


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_scores_with_a_soft_cap(isa: Isa) -> None:
    header = attention_header() + records_header()
    lib = load(header + "".join(instance_text(*instance) for instance in INSTANCES), isa)
    with team(lib, 2) as made:
        for instance, case in itertools.product(INSTANCES, USED):
            call(lib, made, instance, case, False, 2.0)


@pytest.mark.parametrize("tuning", [Tuning(1, 32, 0, 32), Tuning(2, 64, 3, 64), Tuning(40, 512, 8, 1024)], ids=str)
def test_every_tuning_is_right(tuning: Tuning) -> None:
    check_cases(supported()[-1], 2, [(150, "none", bits) for bits in BITS], USED, tuning)


def test_keys_and_values_are_alike_and_products_float32() -> None:
    with pytest.raises(ValueError, match="takes keys and values alike and float32 products, got 8 and 6 features"):
        attention("a", 8, 6, cache="q8")
    with pytest.raises(ValueError, match="bf16 products"):
        attention("a", 8, 8, cache="q4", products="bf16")


def difficult_rows(d: int) -> np.ndarray:
    """[2, 3, 4, d] token-major: also zeros, equal numbers, subnormal, huge and not finite ones."""
    rng = np.random.default_rng(d)
    new = rng.standard_normal((2, 4, 3, d), np.float32).swapaxes(1, 2) * 3 + 1
    new[0, 0, :2] = [[0], [2]]
    new[0, 1, 0, 0], new[0, 1, 1, d // 2], new[0, 1, 2, -1] = math.nan, math.inf, -math.inf
    new[0, 2, :2] *= np.float32([[1e-42], [1e37]])
    new[0, 2, 2] = np.float32(3.4e38)
    new[1, 0, 0] = -new[1, 0, 0].clip(0)
    return new


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_rows_are_written_as_the_op_does(isa: Isa, bits: int) -> None:
    lib = load(UPDATES, isa)
    with team(lib, 2) as made:
        for d in FEATURES:
            new, rng = difficult_rows(d), np.random.default_rng(0)
            cache = rng.integers(0, 256, (2, 3, 10, record_bytes(d, bits)), np.uint8)
            expected = cache.copy()
            expected[:, :, 6:10] = quantize_records(torch.from_numpy(new.copy()), bits).numpy()
            sizes = [2, 3, 4, d, 10, *strides(new, 3)]
            assert run(lib, made, f"update{bits}", sizes, [cache, new, np.array(6)]) == 0
            np.testing.assert_array_equal(cache, expected, err_msg=str(d))
            assert run(lib, made, f"update{bits}", sizes, [cache, new, np.array(7)]) == 1
            np.testing.assert_array_equal(cache, expected)
