"""Caches on GPUs: rows written as the dialect ops write them, to the bit, and attention over records."""

from __future__ import annotations

import pytest
import torch

from sylvester.backends.cuda.compile import build
from sylvester.codegen.gpu_architectures import SHARED
from sylvester.codegen.gpu_attention import Form, kernel, space
from sylvester.codegen.gpu_caches import APART, grid, kv_update
from sylvester.codegen.gpu_kernel import paired
from sylvester.compiler import cache_ops, ops
from tests.gpu import builds, run
from tests.test_gpu_attention import DTYPES, compute, flat, padded, strides_of


def updated(cache, x, past, stored):
    """The cache that the kernel leaves; x is a view with strides of its own."""
    batch, heads, rows, d = x.shape
    cache, total = cache.clone(), batch * heads * rows
    given = {
        "cache": flat(cache), "x": flat(x), "past": past.reshape(1), "total": total, "heads": heads, "rows": rows,
        "keys": cache.shape[2], **strides_of("cache", cache), **strides_of("x", x),
    }  # fmt: skip
    made = kv_update(d, {v: k for k, v in DTYPES.items()}[x.dtype], stored)
    run(made, grid(total), **{name: given[name] for name in made.types})
    return cache


@pytest.mark.parametrize("stored", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("d", [8, 33])
def test_rows_of_floats(stored, d):
    cache, past = torch.randn(2, 3, 16, d).to(DTYPES[stored]), torch.tensor(11)
    x = padded(2, 3, 5, d)
    assert torch.equal(updated(cache, x, past, stored), ops.kv_update(cache, x, past))


def test_rows_past_the_cache_are_left_out():
    cache, x = torch.zeros(1, 2, 4, 8), padded(1, 2, 3, 8)
    found = updated(cache, x, torch.tensor(2), "f32")
    assert torch.equal(found[:, :, 2:], x[:, :, :2])
    assert not found[:, :, :2].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("d", [8, 70, 128])
def test_records_have_the_same_bytes(bits, d):
    x = padded(2, 2, 5, d)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2, 3], x[0, 0, 3, 5] = 0.0, 2.5, torch.nan, -torch.inf
    x[1, 0, 1] = (x[1, 0, 1] * 4).round() / 2  # halves between numbers
    x[1, 1, 2] = -x[1, 1, 2].abs()
    cache = torch.randint(256, (2, 2, 9, cache_ops.record_bytes(d, bits)), dtype=torch.uint8)
    past = torch.tensor(3)
    found, expected = updated(cache, x, past, f"q{bits}"), cache_ops.kv_update_q(cache, x, past, bits)
    same = (found == expected).all(-1)
    assert same[:, :, :3].all()
    wide = [cache_ops.dequantize_records(t, d, bits).nan_to_num(7e7) for t in (found, expected)]
    assert torch.equal(*wide)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("splits", [1, 4])
def test_attention_over_records(bits, splits):
    d, past = 70, torch.tensor(30)
    q = padded(1, 4, 2, d)
    k, v = (cache_ops.quantize_records(padded(1, 2, 40, d), bits) for _ in range(2))
    form = Form(d, d, 2, k=f"q{bits}", v=f"q{bits}", past=True)
    y = compute(form, q, k, v, past=past.reshape(1), scale=0.1, splits=splits)
    expected = cache_ops.attention_q(q.double(), k, v, None, past, 0.1, True, 0, 0.0, bits)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_examples_of_the_dialect(number):
    q, k, v, mask, past, scale, causal, window, softcap, bits = ops.sample(cache_ops.attention_q.examples[number])
    form = Form(
        q.shape[3], q.shape[3], q.shape[1] // k.shape[1], k=f"q{bits}", v=f"q{bits}", causal=causal,
        mask="none" if mask is None else "float", capped=softcap > 0, past=past is not None,
    )  # fmt: skip
    at = None if past is None else past.reshape(1)
    y = compute(form, q, k, v, mask, at, scale, window, softcap)
    given = (q.double(), k, v, mask, past, scale, causal, window, softcap, bits)
    torch.testing.assert_close(y.double(), cache_ops.attention_q.reference(*given), atol=1e-5, rtol=1e-5)


def test_records_of_two_kinds():
    with pytest.raises(ValueError, match="keys are q8 and values q4"):
        kernel(Form(64, 64, k="q8", v="q4"), space(Form(64, 64), 1, "sm_90")[0])


@pytest.mark.parametrize(("stored", "arch"), [("q4", "sm_80"), ("q8", "sm_89"), ("bf16", "sm_90")])
def test_machine_code(stored, arch):
    builds(kv_update(80, "f32", stored), (arch,))


@pytest.mark.nightly
@pytest.mark.parametrize("stored", ["q4", "q8"])
@pytest.mark.parametrize("products", ["bf16", "f32"])
@pytest.mark.parametrize("arch", SHARED)
def test_machine_code_of_attention_over_records(stored, products, arch):
    form = Form(128, 128, 4, k=stored, v=stored, past=True, products=products)
    for tiles in space(form, 1, arch):
        assert build(kernel(form, tiles, 8), arch).shared <= SHARED[arch]


def test_machine_code_of_two_updates():
    builds(paired(kv_update(128, "f32", "bf16", ("cache", "x")), APART), ("sm_90",))
