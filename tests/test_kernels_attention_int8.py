"""Attention with products of bytes against float64: limits, windows, masks, caps, biased keys and values, odd sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from sylvester.codegen.attention import Tuning, attention, attention_header, part_floats
from sylvester.codegen.bfloat16 import bf16_bits, bf16_values
from sylvester.codegen.formats import format_headers, quantised_headers
from sylvester.codegen.isa import Isa
from sylvester.codegen.layout import FormatName
from sylvester.codegen.prelude import render
from tests.kernel_harness import export, load, run, strides, supported, team
from tests.test_kernels_attention import CASES, make_mask, reference

INSTANCES = [(64, 64, "none", "f32"), (7, 5, "float", "f32"), (40, 33, "bool", "bf16"), (70, 96, "none", "bf16")]
USED = [case for case in CASES if case[7] >= 0 and (case[6] == 0 or case[5] == case[7] + case[3])]
"""Cases that a call with a position or without one can express."""
CASE = (1, 3, 1, 130, 700, 700, 1, 570, 450)
BYTES, EXACT = ("vnni", "bf16", "amx", "dotprod", "relaxed"), 1e-5
Instance = tuple[int, int, str, str]
ISAS = supported("q8", "bf16")
each_isa = pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.name in BYTES], ids=lambda isa: isa.name)


@dataclass(frozen=True)
class Given:
    """Options of a call: room for parts of the keys, a cap, and how far channels of keys and values are off zero."""

    part: bool = False
    softcap: float = 0.0
    key_bias: float = 0.0
    value_bias: float = 0.0


def name_of(d: int, dv: int, mask: str, cache: str) -> str:
    return f"bytes_{d}_{dv}_{mask}_{cache}"


def source(instances: list[Instance], tuning: Tuning | None = None) -> str:
    """Instances with their sizes i[], operands p[], and the scale and the cap as bits."""
    parts = [render("amx.h.in"), render("amx_panel.h.in"), *quantised_headers(("q8",)), attention_header(tuning)]
    for instance in instances:
        name = name_of(*instance)
        given = ", ".join([*(f"p[{n}]" for n in range(7)), *(f"i[{n}]" for n in range(22))])
        cap = "sv_float((uint32_t)i[25])"
        call = f"a{name}_call(t, {given}, sv_float((uint32_t)i[22]), i[23], i[24], {cap}, NULL, NULL);"
        parts += [attention(f"a{name}", *instance, products="int8"), render("attention_call.c.in", NAME=f"a{name}")]
        parts.append(export(name, call, f"a{name}_scratch"))
    return "".join(parts)


def errors(lib, made, instance: Instance, case, given: Given) -> tuple[float, int]:
    """The error of one call relative to the result, less what is common to all of its rows; the rows of a tile."""
    d, dv, mask_kind, cache = instance
    batch, heads, kv_heads, rows, most, keys, causal, offset, window = case
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, rows, heads, d), np.float32).swapaxes(1, 2)
    y = np.full((batch, rows, heads, dv), np.nan, np.float32).swapaxes(1, 2)
    k, v = (rng.standard_normal((batch, kv_heads, most, n), np.float32) for n in (d, dv))
    k += given.key_bias * rng.standard_normal((1, kv_heads, 1, d), np.float32)
    v += (bias := given.value_bias * rng.standard_normal((1, kv_heads, 1, dv), np.float32))
    stored = (bf16_bits(k), bf16_bits(v)) if cache == "bf16" else (k, v)
    k, v = (bf16_values(x) for x in stored) if cache == "bf16" else stored
    mask = make_mask(rng, mask_kind, (batch, heads, rows, keys))
    room = np.full(part_floats(dv), np.nan, np.float32) if given.part else None
    past = np.array(offset) if causal else None
    steps = [n for x in (y, q, *stored) for n in strides(x, 3)] + ([0] * 4 if mask is None else strides(mask, 4))
    scale, cap = (int(np.float32(x).view(np.uint32)) for x in (d**-0.5, given.softcap))
    sizes = [0 if room is None else room.size, batch, heads, kv_heads, rows, most if causal else keys]
    operands = [y, q, *stored, mask, past, room]
    assert run(lib, made, name_of(*instance), [*sizes, *steps, scale, causal, window, cap], operands) == 0
    exact = reference(q, k, v, mask, case, given.softcap)
    common = np.repeat(bias, heads // kv_heads, 1)
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact - common)), rows * heads // kv_heads


def steady(case) -> bool:
    return case[6] == 1 and case[3] <= 16


def check(isa: Isa, threads: int, instances, cases, given=(Given(),), tuning: Tuning | None = None, first="") -> None:
    """Few rows, calls over caches with few queries and variants without such products are exact to float32."""
    lib = load(first + source(instances, tuning), isa)
    with team(lib, threads) as made:
        for instance, case, options in itertools.product(instances, cases, given):
            error, rows = errors(lib, made, instance, case, options)
            if isa.name not in BYTES or rows <= 8 or steady(case):
                assert error < EXACT * (1 + 10 * (options.key_bias + options.value_bias)), (instance, case, options)
            else:
                assert (1e-3 if rows > 100 else EXACT) < error < 2.5e-2, (instance, case, options)


@each_isa
def test_close_to_float64(isa):
    check(isa, 3, INSTANCES, [*USED, CASE], [Given(), Given(part=True)])


@each_isa
def test_dot_products_of_seven_bits(isa):
    check(isa, 2, INSTANCES[1:3], [CASE], [Given(), Given(key_bias=2)], first="#define SV_Q_SEVEN 1\n")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.name not in BYTES][-1:], ids=lambda isa: isa.name)
def test_other_variants_stay_in_float32(isa):
    check(isa, 3, INSTANCES[1:3], [*USED[:4], CASE])


@each_isa
def test_biased_keys_and_values_and_caps(isa):
    given = [Given(key_bias=5), Given(value_bias=10), Given(softcap=3), Given(key_bias=2, value_bias=3, softcap=20)]
    check(isa, 2, INSTANCES, [CASE, (2, 4, 2, 37, 40, 40, 0, 0, 0)], given)


@pytest.mark.parametrize("tuning", [Tuning(1, 32, 0, 32), Tuning(40, 512, 8, 1024)], ids=str)
def test_every_tuning_is_right(tuning):
    check(ISAS[-1], 2, INSTANCES[2:3], [CASE], [Given(), Given(part=True)], tuning)


@each_isa
def test_one_far_key_leaves_the_others_their_weights(isa):
    """A row whose greatest weight is far above all others: the mean stands for what rounds to nothing."""
    q, k, v = (np.zeros((1, 1, 256, 64), np.float32) for _ in range(3))
    q[..., 0], k[0, 0, 7, 0], v[..., 1] = 8, 6.3, 5
    v[0, 0, 7, 1] = 9
    y = np.full_like(q, np.nan)
    lib = load(source(INSTANCES), isa)
    scale = int(np.float32(0.125).view(np.uint32))
    steps = [n for x in (y, q, k, v) for n in strides(x, 3)]
    with team(lib, 1) as made:
        numbers = [0, 1, 1, 1, 256, 256, *steps, 0, 0, 0, 0, scale, 0, 0, 0]
        assert run(lib, made, name_of(*INSTANCES[0]), numbers, [y, q, k, v, None, None, None]) == 0

    share = np.exp(6.3) / (np.exp(6.3) + 255)
    np.testing.assert_allclose(y[0, 0, :, 1], 5 + 4 * share, rtol=2e-3)


@each_isa
def test_rows_that_see_nothing_are_zero_and_nan_stays(isa):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 40, d)).astype(np.float32) for d in (7, 7, 5))
    mask = np.zeros((1, 1, 40, 40), np.float32)
    mask[0, 0, 3:6] = -np.inf
    lib = load(source(INSTANCES), isa)
    with team(lib, 1) as made:
        for operand, place in ((None, 0), (q, (0, 0, 9, 2)), (k, (0, 0, 9, 2)), (v, (0, 0, 9, 2))):
            if operand is not None:
                operand[place] = np.nan
            y = np.full((1, 1, 40, 5), 7, np.float32)
            steps = [n for x in (y, q, k, v) for n in strides(x, 3)] + strides(mask, 4)
            numbers = [0, 1, 1, 1, 40, 40, *steps, int(np.float32(0.4).view(np.uint32)), 0, 0, 0]
            assert run(lib, made, name_of(*INSTANCES[1]), numbers, [y, q, k, v, mask, None, None]) == 0
            if operand is None:
                assert (y[0, 0, 3:6] == 0).all()
                assert np.isfinite(y).all()
                continue
            seen = [9] if operand is q else [n for n in range(40) if n not in (3, 4, 5)]
            assert np.isnan(y[0, 0, seen]).any(-1).all()
            operand[place] = 0


@pytest.mark.parametrize("formats", [("q4",), ("q3", "bf16"), ("bf16",)], ids="+".join)
@each_isa
def test_weights_of_other_formats_may_be_beside_it(isa: Isa, formats: tuple[FormatName, ...]) -> None:
    load("".join([*format_headers(formats, isa), attention_header(), attention("a", 64, 64)]), isa)
