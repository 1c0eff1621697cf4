"""attention over a tree of queries: each has, bit for bit, what it has at the end of the chain from the root to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylvester.codegen.attention import STEADY_QUERIES, attention, attention_header, part_floats, records_header
from sylvester.codegen.bfloat16 import bf16_bits
from sylvester.codegen.prelude import render
from sylvester.compiler.cache_ops import quantize_records
from sylvester.compiler.token_tree import path_to
from tests.kernel_harness import export, load, run, strides, supported, team

INSTANCES = ((64, 64, "none", "f32"), (7, 5, "float", "f32"), (40, 33, "none", "bf16"))
INSTANCES += ((40, 40, "none", "q8"), (70, 70, "float", "q4"))
# batch, heads, key heads, cache rows, past, window
PLACES = ((1, 6, 2, 64, 3, 0), (2, 4, 4, 300, 250, 0), (1, 12, 1, 700, 505, 0), (1, 4, 2, 1100, 1050, 300))
PLACES += ((1, 2, 2, 40, 0, 7),)
TREES = ((0, 1, 2, 3, 2, 1, 1), (0, 0, 1, 1), (0, *range(1, 9), 5, 6, 7, 2, 3, 4, 1), (0, 1, 2), (0,))


def name_of(d, dv, mask, cache):
    return f"tree_{d}_{dv}_{mask}_{cache}"


def text_of(instance):
    """One attention with its sizes i[] and operands p[], as a plan calls it."""
    name = f"a{name_of(*instance)}"
    given = ", ".join([*(f"p[{n}]" for n in range(7)), *(f"i[{n}]" for n in range(22))])
    call = f"{name}_call(t, {given}, sv_float((uint32_t)i[22]), 1, i[23], 0, NULL, p[7]);"
    return (
        attention(name, *instance)
        + render("attention_call.c.in", NAME=name)
        + export(name[1:], call, f"{name}_scratch")
    )


SOURCE = attention_header() + records_header() + "".join(map(text_of, INSTANCES))


def stored(rng, cache, *shape):
    values = rng.standard_normal(shape, np.float32)
    if cache == "f32":
        return values
    return bf16_bits(values) if cache == "bf16" else quantize_records(torch.from_numpy(values), int(cache[1])).numpy()


def attend(lib, made, instance, place, operands, depths, status=0):
    """The result for queries [batch, heads, n, d] over caches of which the last rows are those of the queries."""
    q, k, v, mask, part = operands
    (d, dv, *_), (batch, heads, kv_heads, most, past, window) = instance, place
    rows = q.shape[2]
    y = np.full((batch, rows, heads, dv), np.nan, np.float32).swapaxes(1, 2)
    steps = [n for x in (y, q, k, v) for n in strides(x, 3)]
    steps += [0] * 4 if mask is None else strides(mask, 4)
    scale = int(np.float32(d**-0.5).view(np.uint32))
    sizes = [part.size, batch, heads, kv_heads, rows, most]
    tree = None if depths is None else np.array(depths, np.int64)
    arrays = [y, q, k, v, mask, np.array(past), part, tree]
    assert run(lib, made, name_of(*instance), [*sizes, *steps, scale, window], arrays) == status
    return y


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("isa", "threads"), [*((isa, 3) for isa in supported()), (supported()[-1], 1)], ids=lambda x: getattr(x, "name", x)
)
def test_a_query_is_the_same_in_a_tree_and_at_the_end_of_a_chain(isa, threads):
    lib = load(SOURCE, isa)
    with team(lib, threads) as made:
        for number, instance in enumerate(INSTANCES):
            for place in PLACES:
                check(lib, made, instance, place, TREES[(number + place[0]) % 3 :])


def check(lib, made, instance, place, trees):
    (d, dv, mask_kind, cache), (batch, heads, kv_heads, most, past, _) = instance, place
    rng = np.random.default_rng(0)
    part = np.zeros(part_floats(dv), np.float32)
    mask = rng.standard_normal((1, heads, 1, most), np.float32) if mask_kind == "float" else None
    mask = None if mask is None else np.broadcast_to(mask, (batch, heads, STEADY_QUERIES, most))
    for depths in trees:
        q = rng.standard_normal((batch, heads, len(depths), d), np.float32)
        k, v = (stored(rng, cache, batch, kv_heads, most, n) for n in (d, dv))
        together = attend(lib, made, instance, place, (q, k, v, mask, part), depths)
        for token in range(len(depths)):
            path = path_to(depths, token)
            alone = [x.copy() for x in (k, v)]
            for x, y in zip(alone, (k, v), strict=True):
                x[:, :, past : past + len(path)] = y[:, :, [past + t for t in path]]
            at = (*place[:4], past + len(path) - 1, place[5])
            last = np.ascontiguousarray(q[:, :, token : token + 1])
            expected = attend(lib, made, instance, at, (last, *alone, mask, part), None)
            assert np.isfinite(expected).all()
            assert np.array_equal(together[:, :, token : token + 1], expected), (instance, place, depths, token)


@pytest.mark.parametrize("depths", [(0, 2), (1,), (0, -1), tuple(range(STEADY_QUERIES + 1))], ids=str)
def test_what_is_no_tree_in_preorder_fails(depths):
    lib = load(SOURCE, supported()[-1])
    instance, place = INSTANCES[0], (1, 2, 2, 64, 3, 0)
    q, k, v = (np.zeros((1, 2, n, 64), np.float32) for n in (len(depths), 64, 64))
    with team(lib, 1) as made:
        attend(lib, made, instance, place, (q, k, v, None, np.zeros(part_floats(64), np.float32)), depths, status=4)
