"""Attention on GPUs against the dialect op in float64: tiles and parts of keys, masks, windows, caches, odd sizes."""

from __future__ import annotations

import pytest
import torch

from sylvester.backends.cuda.compile import build
from sylvester.codegen.gpu_architectures import SHARED
from sylvester.codegen.gpu_attention import (
    Form,
    Tiles,
    ancestry,
    grid,
    joining,
    joining_grid,
    kernel,
    part_sizes,
    space,
    splits_for,
)
from sylvester.compiler.ops import attention, sample
from sylvester.compiler.quantized_ops import attention_bf16
from sylvester.compiler.token_tree import path_to, tree_visible
from tests.gpu import builds, run

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SMALL = Tiles(16, 16, 4, 2)


def padded(*shape, dtype="f32"):
    """A view [batch, heads, rows, d] with strides of its own, as slices of a larger tensor have."""
    batch, heads, rows, d = shape
    return torch.randn(batch, rows, heads, d + 3)[..., :d].to(DTYPES[dtype]).transpose(1, 2)


def flat(x):
    """The memory of a view from its first element on."""
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))


def strides_of(prefix, x, names=("batch", "head", "row")):
    return {f"{prefix}_{name}": stride for name, stride in zip(names, x.stride(), strict=False)}


def compute(form, q, k, v, mask=None, past=None, scale=0.3, window=0, softcap=0.0, splits=1, tiles=SMALL, **more):
    """y by the kernels, which write into a view with strides of its own."""
    batch, heads, rows, _ = q.shape
    kv_heads = heads if form.listed else k.shape[1]
    y = torch.full((batch, rows, heads, form.dv), torch.nan, dtype=DTYPES[form.y]).transpose(1, 2)
    part, tops = (torch.full((n,), torch.nan) for n in part_sizes(form, splits, batch, kv_heads, rows))
    whole = None if mask is None else torch.broadcast_to(mask, (batch, heads, rows, mask.shape[-1]))
    given = {
        "y": part if splits > 1 else flat(y), "tops": tops, "q": flat(q), "k": flat(k), "v": flat(v), "past": past,
        "kv_heads": kv_heads, "rows": rows, "keys": k.shape[2], "offset": 0, "scale": scale, "softcap": softcap,
        "window": window, **more,
        **strides_of("y", y), **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
    }  # fmt: skip
    if whole is not None:
        given["mask"] = flat(whole.view(torch.uint8) if whole.dtype == torch.bool else whole)
        given |= strides_of("mask", whole, ("batch", "head", "row", "key"))
    made = kernel(form, tiles, splits)
    run(made, grid(form, tiles, splits, batch, kv_heads, rows), **{name: given[name] for name in made.types})
    if splits > 1:
        places = {**strides_of("y", y), "kv_heads": kv_heads, "rows": rows}
        last = joining(form, splits)
        given = {"y": flat(y), "part": part, "tops": tops, **places}
        run(last, joining_grid(form, batch, kv_heads, rows), **{name: given[name] for name in last.types})
    return y


def expected(form, q, k, v, mask=None, past=None, scale=0.3, window=0, softcap=0.0):
    wide = [x.double() for x in (q, k, v)]
    if past is not None:
        wide[1:] = [x[:, :, : int(past) + q.shape[2]] for x in wide[1:]]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return attention(*wide, mask, past, scale, form.causal, window, softcap)


CASES = [
    # d, dv, group, queries, keys, causal, window, softcap, splits
    (8, 8, 1, 37, 37, True, 0, 0.0, 1),
    (40, 24, 2, 19, 19, True, 7, 0.0, 1),
    (33, 7, 1, 5, 70, False, 0, 2.0, 1),
    (16, 16, 3, 1, 61, False, 0, 0.0, 4),
    (24, 40, 2, 3, 33, False, 5, 1.5, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case):
    d, dv, group, rows, keys, causal, window, softcap, splits = case
    form = Form(d, dv, group, causal=causal, windowed=window > 0, capped=softcap > 0)
    q, k, v = padded(2, 2 * group, rows, d), padded(2, 2, keys, d), padded(2, 2, keys, dv)
    y = compute(form, q, k, v, window=window, softcap=softcap, splits=splits)
    torch.testing.assert_close(
        y.double(), expected(form, q, k, v, window=window, softcap=softcap), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("splits", [1, 2])
def test_masks_of_any_strides(kind, splits):
    q, k, v = padded(2, 4, 9, 16), padded(2, 2, 21, 16), padded(2, 2, 21, 16)
    mask = torch.randn(1, 4, 21, 9).transpose(2, 3)
    mask = mask > 0 if kind == "bool" else mask
    mask[:, :, 4] = False if kind == "bool" else -torch.inf
    form = Form(16, 16, 2, mask=kind, causal=False)
    y = compute(form, q, k, v, mask, splits=splits)
    assert (y[:, :, 4] == 0).all()
    torch.testing.assert_close(y.double(), expected(form, q, k, v, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("past", [0, 20, 45])
@pytest.mark.parametrize("stored", ["f32", "bf16", "f16"])
def test_caches_are_read_up_to_the_last_query(past, stored):
    q, k, v = padded(1, 4, 3, 16), padded(1, 2, 48, 16, dtype=stored), padded(1, 2, 48, 16, dtype=stored)
    k[:, :, past + 3 :], v[:, :, past + 3 :] = torch.nan, torch.nan
    form = Form(16, 16, 2, k=stored, v=stored, past=True)
    at = torch.tensor(past)
    y = compute(form, q, k, v, past=at.reshape(1), splits=4)
    torch.testing.assert_close(y.double(), expected(form, q, k, v, past=at), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "splits"), [(0, 1), (6, 2)])
def test_a_tree_of_queries(window, splits):
    q, k, v = padded(1, 4, 7, 16), padded(1, 2, 64, 16), padded(1, 2, 64, 16)
    depths, past = torch.tensor([0, 1, 2, 2, 1, 2, 1]), torch.tensor(29)
    tree = torch.empty(7, 7, dtype=torch.uint8)
    run(ancestry(7), (1,), tree=tree, depths=depths, rows=7)
    form = Form(16, 16, 2, past=True, tree=True, windowed=window > 0)
    y = compute(form, q, k, v, past=past.reshape(1), window=window, splits=splits, tree=tree, depths=depths)
    wide = (x.double() for x in (q, k, v))
    expected = attention(*wide, None, past, 0.3, True, window, depths=depths)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_tree_of_more_queries_than_a_program_finds_ancestors_for():
    depths = torch.tensor([0, 1, 2, 3, 2, 1, 1, 2, 3, 4, 4, 3, 2, 2, 1, 2, 3, 3, 1, 2])
    tree = torch.full((20, 20), 7, dtype=torch.uint8)
    run(ancestry(16), (2,), tree=tree, depths=depths, rows=20)
    assert tree.bool().equal(tree_visible(20, 0, depths, 0))


@pytest.mark.parametrize("stored", ["f32", "bf16"])
@pytest.mark.parametrize(("past", "window"), [(0, 0), (29, 0), (13, 6), (32, 3)])
def test_tokens_of_a_tree_have_the_bits_of_single_ones(past, window, stored):
    """Each by itself: over the keys of its path, where a text of that path has them."""
    q, k, v = padded(1, 6, 7, 16), *(padded(1, 2, 64, 16, dtype=stored) for _ in "kv")
    depths = torch.tensor([0, 1, 2, 2, 1, 2, 1])
    form = Form(16, 16, 3, k=stored, v=stored, past=True, windowed=window > 0, apart=16)
    tree = compute(form, q, k, v, past=torch.tensor([past]), window=window, depths=depths)
    wide = (x.double() for x in (q, k, v))
    expected = attention(*wide, None, torch.tensor(past), 0.3, True, window, depths=depths)
    torch.testing.assert_close(tree.double(), expected, atol=1e-5, rtol=1e-5)
    for token in range(7):
        rows = [past + n for n in path_to(depths.tolist(), token)]
        text = [x.clone() for x in (k, v)]
        for x, held in zip(text, (k, v), strict=True):
            x[:, :, past : past + len(rows)] = held[:, :, rows]
        at, line = torch.tensor([past + len(rows) - 1]), torch.arange(16)
        alone = compute(form, q[:, :, token : token + 1], *text, past=at, window=window, depths=line)
        assert alone.equal(tree[:, :, token : token + 1])


def test_queries_apart_are_built():
    form = Form(64, 64, 4, k="bf16", v="bf16", past=True, windowed=True, apart=16)
    builds(kernel(form, space(form, 1, "sm_80")[0]), ("sm_80",))


def test_queries_apart_are_causal_over_caches():
    with pytest.raises(ValueError, match="computed apart need `past`"):
        kernel(Form(16, 16, apart=16), SMALL)


@pytest.mark.parametrize("shared", [0, 21])
def test_keys_that_the_batch_shares(shared):
    q, k, v = padded(3, 4, 2, 16), padded(3, 2, 40, 16), padded(3, 2, 40, 16)
    past, first = torch.tensor(30), torch.tensor(shared)
    form = Form(16, 16, 2, past=True, shared=True)
    y = compute(form, q, k, v, past=past.reshape(1), shared=first.reshape(1))
    wide = (x.double() for x in (q, k, v))
    expected = attention(*wide, None, past, 0.3, True, 0, shared=first)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("per_head", "window"), [(True, 0), (False, 90)])
def test_listed_blocks_of_keys(per_head, window):
    q, k, v = padded(1, 2, 70, 16), padded(1, 1, 180, 16), padded(1, 1, 180, 16)
    blocks = torch.tensor([[0, 2, -1], [0, 1, 2]])
    if per_head:
        blocks = torch.stack([blocks, torch.tensor([[1, -1, -1], [-1, -1, -1]])])
    form = Form(16, 16, 2, listed=True, causal=window > 0, windowed=window > 0)
    lists = {"lists": blocks.flatten(), "list_batch": 0, "list_head": 6 if per_head else 0, "most": 3}
    y = compute(form, q, k, v, window=window, tiles=Tiles(64, 64, 4, 1), **lists)
    wide = (x.double() for x in (q, k, v))
    expected = attention(*wide, None, None, 0.3, window > 0, window, blocks=blocks)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_tiles_of_listed_blocks():
    form = Form(64, 64, 4, listed=True)
    assert space(form, 512, "sm_89")
    with pytest.raises(ValueError, match="listed blocks need no `past`, no splits and tiles of 64 keys"):
        kernel(form, Tiles(128, 64, 4, 2))


def test_a_tree_of_queries_takes_no_mask():
    with pytest.raises(ValueError, match="a tree of queries needs `past` and takes no mask"):
        kernel(Form(16, 16, past=True, tree=True, mask="bool"), SMALL)


@pytest.mark.parametrize("products", ["bf16", "f16"])
def test_products_of_16_bits(products):
    q, k, v = (padded(1, 2, 40, 32, dtype=products) for _ in range(3))
    form = Form(32, 32, 1, y=products, q=products, k=products, v=products, products=products)
    y = compute(form, q, k, v)
    torch.testing.assert_close(y.double(), expected(form, q, k, v), atol=0.03, rtol=0.03)
    near = torch.cosine_similarity(y.double().flatten(), expected(form, q, k, v).flatten(), dim=0)
    assert near > 0.9999


def test_large_scores_and_rows_that_see_nothing():
    q, k, v = padded(1, 1, 20, 16) * 1e4, padded(1, 1, 20, 16), padded(1, 1, 20, 16)
    form = Form(16, 16)
    y = compute(form, q, k, v, offset=-3)
    assert (y[:, :, :3] == 0).all()
    seen = expected(form, q[:, :, 3:], k[:, :, :17], v[:, :, :17])
    torch.testing.assert_close(y[:, :, 3:].double(), seen, atol=2e-3, rtol=2e-3)


def test_the_same_bits_every_time():
    q, k, v = padded(1, 4, 1, 16), padded(1, 1, 90, 16), padded(1, 1, 90, 16)
    form = Form(16, 16, 4, causal=False)
    first, second = (compute(form, q, k, v, splits=4) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("d", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("products", ["f32", "bf16"])
def test_tiles_for_every_architecture(d, products):
    form = Form(d, d, 4, products=products)
    for arch in SHARED:
        few, many = (space(form, rows, arch) for rows in (1, 512))
        assert all(tiles.rows == 16 for tiles in few[:-2])
        assert len(set(few)) == len(few) <= 12
        assert len(set(many)) == len(many) <= 12
        assert many


def test_splits_fill_the_device():
    form = Form(128, 128, 4)
    assert splits_for(form, 1, 8, 1, 4096, 132) == 32
    assert splits_for(form, 64, 8, 1, 4096, 132) == 1
    assert splits_for(form, 1, 8, 1, 300, 132) == 2
    assert splits_for(form, 1, 8, 512, 4096, 132) == 1


EXAMPLES = [(op, n) for op in (attention, attention_bf16) for n in range(len(op.examples))]


@pytest.mark.parametrize(("op", "number"), EXAMPLES, ids=[f"{op.name} {n}" for op, n in EXAMPLES])
def test_examples_of_the_dialect(op, number):
    q, k, v, mask, past, scale, causal, window, *cap = sample(op.examples[number])
    short = op is attention_bf16
    form = Form(
        q.shape[3], v.shape[3], q.shape[1] // k.shape[1], mask="none" if mask is None else "float", causal=causal,
        windowed=window > 0, capped=bool(cap), past=past is not None, products="bf16" if short else "f32",
    )  # fmt: skip
    at = None if past is None else past.reshape(1)
    y = compute(form, q, k, v, mask, at, scale, window, *cap)
    expected = op.reference(*(x.double() for x in (q, k, v)), mask, past, scale, causal, window, *cap)
    tolerance = 3e-2 if short else 1e-5
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


BUILT = {
    "many queries": (Form(64, 64, 1, "bf16", "bf16", "bf16", "bf16", products="bf16"), 512, 1, ("sm_90",)),
    "parts of a cache": (Form(80, 80, 4, k="bf16", v="bf16", past=True), 1, 8, ("sm_80", "sm_89")),
}
ALIGNED = ("y", "q", "k", "v", "y_row", "q_row", "k_row", "v_row")


@pytest.mark.parametrize(("form", "rows", "splits", "architectures"), BUILT.values(), ids=BUILT)
def test_machine_code(form, rows, splits, architectures):
    for arch in architectures:
        builds(kernel(form, space(form, rows, arch)[0], splits, ALIGNED), (arch,))
    if splits > 1:
        builds(joining(form, splits), architectures[:1])


EVERY = [
    Form(128, 128, 8, "bf16", "bf16", "bf16", "bf16", windowed=True, products="bf16"),
    Form(96, 64, 2, "f16", "f16", "f16", "f16", mask="float", capped=True, causal=False, products="f16"),
    Form(64, 64, 4, past=True, tree=True, windowed=True),
    Form(64, 64, 4, listed=True),
    Form(128, 128, 4, k="bf16", v="bf16", past=True, shared=True),
    Form(256, 256, 4, mask="bool", past=True),
]


@pytest.mark.nightly
@pytest.mark.parametrize("form", EVERY, ids=str)
@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("arch", SHARED)
def test_machine_code_of_all_tiles(form, rows, arch):
    assert space(form, rows, arch)
    for tiles in space(form, rows, arch):
        assert (
            build(kernel(form, tiles, 4 if rows == 1 and not form.listed else 1, ALIGNED), arch).shared <= SHARED[arch]
        )
