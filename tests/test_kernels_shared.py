"""Keys that the rows of a batch share: results against float64, each query's bits in any company; listed blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sylvester.codegen.attention import (
    STEADY_QUERIES,
    Tuning,
    attention,
    attention_header,
    part_floats,
    records_header,
    shared_floats,
)
from sylvester.codegen.prelude import render
from sylvester.compiler.attention_operands import LISTED, listed
from sylvester.compiler.cache_ops import dequantize_records, quantize_records
from tests.kernel_harness import export, load, run, strides, supported, team
from tests.test_kernels_attention import make_mask, make_operands, name_of, pack_args, reference
from tests.test_kernels_attention import source as attention_source
from tests.test_kernels_records import instance_text
from tests.test_kernels_records import name_of as records_name

INSTANCES = ((64, 64, "none", "f32"), (40, 32, "none", "bf16"), (7, 5, "float", "f32"))
# batch, heads, key heads, cache rows, position of the first query, shared keys, window, soft cap
CASES = [
    (4, 4, 2, 700, 520, 500, 0, 0.0),
    (3, 6, 2, 300, 90, 64, 0, 0.0),
    (12, 8, 1, 300, 270, 257, 0, 2.0),
    (2, 2, 2, 1100, 1040, 1000, 700, 0.0),
    (5, 3, 3, 400, 300, 300, 40, 0.0),
    (1, 4, 2, 300, 200, 100, 0, 0.0),
]
COMPANY = ((0, 1), (7, 1), (15, 1), (0, 2), (3, 3), (5, 11))


class Shared:
    """A call in which every row of the batch reads the first keys of row 0; the other rows have NaN there."""

    def __init__(self, lib, made, instance, case):
        batch, heads, kv_heads, most, self.past, self.shared, self.window, self.softcap = case
        self.lib, self.made, self.instance, self.sizes = lib, made, instance, (batch, heads, kv_heads, most)
        d, dv, kind, cache = instance
        rng, end = np.random.default_rng(0), self.past + STEADY_QUERIES
        whole = (batch, heads, kv_heads, STEADY_QUERIES, most, end, 1, self.past, self.window)
        self.y, self.q, self.stored, (k, v) = make_operands(rng, d, dv, cache, whole)
        self.mask = make_mask(rng, kind, (batch, heads, STEADY_QUERIES, end))
        for x in (k, v):
            x[:, :, : self.shared] = x[:1, :, : self.shared]
        self.exact = reference(self.q, k, v, self.mask, whole, self.softcap)
        for x in self.stored:
            x[1:, :, : self.shared] = 0x7FC0 if cache == "bf16" else np.nan
        self.part = np.full(part_floats(dv) + batch * heads * shared_floats(dv), np.nan, np.float32)

    def __call__(self, first, count, steady=1, room=None):
        batch, heads, kv_heads, most = self.sizes
        at = self.past + first
        y = np.full_like(self.y[:, :, first : first + count], np.nan)
        mask = None if self.mask is None else self.mask[:, :, first : first + count]
        case = (batch, heads, kv_heads, count, most, at + count, 1, at, self.window)
        part = self.part[:room]
        args = pack_args(y, self.q[:, :, first : first + count], *self.stored, mask, case, part, self.softcap)
        args.steady, args.shared = steady, self.shared
        assert run(self.lib, self.made, name_of(*self.instance), [], [np.frombuffer(args, np.uint8)]) == 0
        return y


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_shared_keys_are_read_from_the_first_row_and_keep_the_bits_of_a_query(isa, threads):
    lib = load(attention_source(INSTANCES), isa)
    with team(lib, threads) as made:
        for instance, case in itertools.product(INSTANCES, CASES):
            call = Shared(lib, made, instance, case)
            together = call(0, STEADY_QUERIES)
            np.testing.assert_allclose(together, call.exact, rtol=1e-5, atol=3e-6, err_msg=str((instance, case)))
            for first, count in COMPANY:
                same = np.array_equal(call(first, count), together[:, :, first : first + count])
                assert same, (instance, case, first, count)
            for steady, room in ((0, None), (0, 0), (1, 10)):
                y = call(0, STEADY_QUERIES, steady, room)
                np.testing.assert_allclose(y, call.exact, rtol=1e-5, atol=3e-6, err_msg=str((instance, case, steady)))


@pytest.mark.parametrize("tuning", [Tuning(1, 32, 0, 32), Tuning(40, 512, 8, 1024)], ids=str)
def test_every_tuning_is_right(tuning):
    instance = INSTANCES[0]
    lib = load(attention_source([instance], tuning), supported()[-1])
    with team(lib, 2) as made:
        for case in CASES:
            call = Shared(lib, made, instance, case)
            y = call(0, STEADY_QUERIES)
            np.testing.assert_allclose(y, call.exact, rtol=1e-5, atol=3e-6, err_msg=str(case))
            assert np.array_equal(call(3, 2), y[:, :, 3:5])


@pytest.mark.parametrize("bits", [8, 4])
def test_shared_records(bits):
    check_records(supported()[-1], bits)


def check_records(isa, bits):
    batch, heads, kv_heads, rows, most, past, d, shared = 5, 6, 2, 3, 400, 330, 70, 301
    rng = np.random.default_rng(0)
    lib = load(attention_header() + records_header() + instance_text(d, "none", bits), isa)
    q, y = (rng.standard_normal((batch, rows, heads, d), np.float32).swapaxes(1, 2) for _ in range(2))
    floats = [torch.from_numpy(rng.standard_normal((batch, kv_heads, most, d), np.float32)) for _ in "kv"]
    k, v = (quantize_records(x, bits) for x in floats)
    for x in (k, v):
        x[:, :, :shared] = x[:1, :, :shared]
    wide = [dequantize_records(x, d, bits).numpy() for x in (k, v)]
    exact = reference(q, *wide, None, (batch, heads, kv_heads, rows, most, past + rows, 1, past, 0))
    for x in (k, v):
        x[1:, :, :shared] = 255
    room = np.zeros(part_floats(d) + batch * heads * shared_floats(d), np.float32)
    steps = [n for x in (y, q, k.numpy(), v.numpy()) for n in strides(x, 3)]
    scale, cap = (int(np.float32(x).view(np.uint32)) for x in (d**-0.5, 0.0))
    operands = [y, q, k.numpy(), v.numpy(), None, np.array(past), room, np.array(shared)]
    with team(lib, 2) as made:
        for size in (room.size, 0):
            y[:] = np.nan
            integers = [size, batch, heads, kv_heads, rows, most, *steps, 0, 0, 0, 0, scale, 1, 0, cap]
            assert run(lib, made, records_name(d, "none", bits), integers, operands) == 0
            np.testing.assert_allclose(y, exact, rtol=1e-5, atol=4e-6)
        operands[-1] = np.array(past + 1)
        assert run(lib, made, records_name(d, "none", bits), integers, operands) == 2


LISTS = [(64, 64, "none", "f32"), (7, 5, "float", "f32"), (40, 33, "bool", "bf16")]
# batch, heads, key heads, queries, keys, causal, window, axes of the lists
LISTED_CASES = [(2, 4, 2, 200, 200, 1, 0, 4), (1, 6, 2, 130, 500, 0, 0, 2), (2, 2, 2, 65, 300, 0, 0, 3)]
LISTED_CASES += [(1, 8, 1, 300, 300, 1, 100, 2), (1, 1, 1, 3, 33, 0, 0, 2)]


def listed_text(instance):
    """An attention over listed blocks with its sizes i[] and operands p[]."""
    name = name_of(*instance)
    given = ", ".join([*(f"p[{n}]" for n in range(5)), "NULL, NULL, 0", *(f"i[{n}]" for n in range(21))])
    tail = "sv_float((uint32_t)i[21]), i[22], i[23], 0, p[5], i[24], i[25], i[26], i[27]"
    text = attention(f"a{name}", *instance) + render("attention_blocks.c.in", NAME=f"a{name}")
    return text + export(name, f"a{name}_call(t, {given}, {tail});", f"a{name}_scratch")


def random_lists(rng, leading, queries, keys):
    """Ascending numbers of blocks, then -1; the first list is empty."""
    count, blocks = -(-keys // LISTED), -(-queries // LISTED)
    lists = np.full((*leading, blocks, count + 1), -1, np.int64)
    for place in itertools.islice(np.ndindex(*leading, blocks), 1, None):
        chosen = np.flatnonzero(rng.random(count) < 0.5)
        lists[place][: len(chosen)] = chosen
    return lists


@pytest.mark.parametrize("tuning", [None, Tuning(1, 32, 0, 32)], ids=["default", "small"])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_listed_blocks(isa, tuning):
    tuning = tuning and Tuning(24, 32)
    lib = load(attention_header(tuning) + "".join(map(listed_text, LISTS)), isa)
    with team(lib, 2) as made:
        for instance, case in itertools.product(LISTS, LISTED_CASES):
            check_lists(lib, made, instance, case)


def check_lists(lib, made, instance, case, change=None):
    d, dv, kind, cache = instance
    batch, heads, kv_heads, queries, keys, causal, window, axes = case
    rng = np.random.default_rng(0)
    whole = (batch, heads, kv_heads, queries, keys, keys, causal, 0, window)
    y, q, stored, (k, v) = make_operands(rng, d, dv, cache, whole)
    mask = make_mask(rng, kind, (batch, heads, queries, keys))
    lists = random_lists(rng, (batch, heads)[4 - axes :], queries, keys)
    if change is not None:
        lists[...] = (*change, *[-1] * (lists.shape[-1] - len(change)))
    steps = [n for x in (y, q, *stored) for n in strides(x, 3)] + ([0] * 4 if mask is None else strides(mask, 4))
    by = [*[0] * (4 - axes), *strides(lists, axes - 1)]
    scale = int(np.float32(d**-0.5).view(np.uint32))
    integers = [batch, heads, kv_heads, queries, keys, *steps, scale, causal, window, lists.shape[-1], *by]
    code = run(lib, made, name_of(*instance), integers, [y, q, *stored, mask, lists])
    if code:
        return code
    seen = np.broadcast_to(listed(torch.from_numpy(lists), queries, keys).numpy(), (batch, heads, queries, keys))
    hidden = np.where(seen, np.float32(0), np.float32(-np.inf))
    given = hidden if mask is None else np.where(mask, hidden, -np.inf) if mask.dtype == bool else mask + hidden
    np.testing.assert_allclose(y, reference(q, k, v, given, whole), rtol=1e-5, atol=3e-6, err_msg=str((instance, case)))
    return 0


@pytest.mark.parametrize("wrong", [(1, 1, -1), (2, 0, -1), (-1, 1, -1), (0, 8, -1)])
def test_lists_that_do_not_ascend_are_an_error(wrong):
    lib = load(attention_header() + "".join(map(listed_text, LISTS)), supported()[-1])
    with team(lib, 2) as made:
        assert check_lists(lib, made, LISTS[0], LISTED_CASES[1], wrong) == 5
        assert check_lists(lib, made, LISTS[0], LISTED_CASES[1], (0, 3, -1)) == 0
