"""Attention of int8 queries and keys on GPUs: near float64, and nearer with smoothing (SageAttention2)."""

from __future__ import annotations

import pytest
import torch

from sylvester.backends.cuda.compile import build
from sylvester.codegen import gpu_attention_int8 as family
from sylvester.codegen.gpu_architectures import SHARED
from sylvester.codegen.gpu_attention import Form, Tiles, grid
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import attention
from sylvester.compiler.quantized_ops import attention_int8
from tests.gpu import builds, run
from tests.test_gpu_attention import flat, padded, strides_of

VALUES = {"fp8": torch.float8_e4m3fn, "f16": torch.float16}
SMALL = Tiles(16, 32, 4, 2)
ALLOWED = {"fp8": 5e-2, "f16": 2e-2}
"""Relative errors: a weight of 8 bits, and a value, each is off by up to 1 / 16."""


def pack(form, k, v, rows, values, past=None):
    """Packed keys and values with a scale a row, and the means and scales of channels."""
    batch, kv_heads, keys, _ = k.shape
    sizes = family.sizes(form, batch, kv_heads, keys)
    memory = {
        "parts": torch.full((sizes.parts,), torch.nan), "keys8": torch.empty(sizes.keys8, dtype=torch.int8),
        "key_scales": torch.empty(sizes.key_scales), "values8": torch.empty(sizes.values8, dtype=VALUES[values]),
        "channels": torch.full((sizes.channels,), torch.nan),
    }  # fmt: skip
    given = {
        **memory, "k": flat(k), "v": flat(v), "past": past, "kv_heads": kv_heads, "rows": rows, "keys": keys,
        "room": family.room(keys), **strides_of("k", k), **strides_of("v", v),
    }  # fmt: skip
    first, second = family.summary(form), family.packing(form, values)
    run(first, (family.PARTS, batch * kv_heads), **{name: given[name] for name in first.types})
    run(second, family.packing_grid(batch, kv_heads, keys), **{name: given[name] for name in second.types})
    return memory


def compute(form, q, k, v, values="fp8", mask=None, past=None, scale=0.2, window=0, softcap=0.0, packed=None):
    batch, heads, rows, _ = q.shape
    y = torch.full((batch, rows, heads, form.dv), torch.nan).transpose(1, 2)
    at = None if past is None else past.reshape(1)
    given = {
        **(packed or pack(form, k, v, rows, values, at)), "y": flat(y), "q": flat(q), "past": at, "scale": scale,
        "softcap": softcap, "window": window, "kv_heads": k.shape[1], "rows": rows, "keys": k.shape[2], "offset": 0,
        "room": family.room(k.shape[2]), **strides_of("y", y), **strides_of("q", q),
    }  # fmt: skip
    if mask is not None:
        whole = torch.broadcast_to(mask, (batch, heads, rows, mask.shape[-1]))
        given |= {"mask": flat(whole), **strides_of("mask", whole, ("batch", "head", "row", "key"))}
    made = family.kernel(form, values, SMALL)
    run(made, grid(form, SMALL, 1, batch, k.shape[1], rows)[:1], **{name: given[name] for name in made.types})
    return y


def biased(*shape):
    """Keys with a large mean in some channels, as models have."""
    x = padded(*shape)
    x[..., ::5] += 6
    return x


def error(y, exact):
    return float((y.double() - exact).norm() / exact.norm())


CASES = [
    # batch, d, dv, group, queries, keys, causal, window, softcap, values
    (1, 40, 24, 2, 37, 37, True, 0, 0.0, "fp8"),
    (1, 64, 64, 1, 33, 70, False, 9, 0.0, "f16"),
    (2, 16, 33, 3, 7, 20, True, 6, 2.0, "fp8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_float64(case):
    batch, d, dv, group, rows, keys, causal, window, softcap, values = case
    form = Form(d, dv, group, causal=causal, windowed=window > 0, capped=softcap > 0)
    q, k, v = padded(batch, 2 * group, rows, d), biased(batch, 2, keys, d), padded(batch, 2, keys, dv)
    y = compute(form, q, k, v, values, window=window, softcap=softcap)
    exact = attention(q.double(), k.double(), v.double(), None, None, 0.2, causal, window, softcap)
    assert torch.cosine_similarity(y.double().flatten(), exact.flatten(), dim=0) >= 0.999
    assert error(y, exact) <= ALLOWED[values]


def test_packed_rows_stand_for_keys_and_values_less_their_means():
    form = Form(24, 7, causal=False)
    k, v = biased(1, 2, 41, 24), biased(1, 2, 41, 7)
    memory = pack(form, k, v, 41, "f16")
    keys = memory["keys8"].reshape(2, 128, 32).double() * memory["key_scales"].reshape(2, 128, 1)
    channels = memory["channels"].reshape(2, 32 + 2 * 16).double()
    step = float(memory["key_scales"].max())
    torch.testing.assert_close(keys[:, :41, :24] + channels[:, None, :24], k[0].double(), atol=step / 2 + 1e-5, rtol=0)
    values = memory["values8"].reshape(2, 16, 128).transpose(1, 2).double() * channels[:, None, 48:]
    torch.testing.assert_close(values[:, :41, :7] + channels[:, None, 32:39], v[0].double(), atol=5e-3, rtol=0)
    assert not keys[:, 41:].any()
    assert not values[:, 41:].any()


def test_smoothing_alone_is_exact():
    """What is the same in all keys changes no bit, where their sums have no rounding."""
    form = Form(16, 16)
    q, v = padded(1, 2, 20, 16), padded(1, 2, 32, 16)
    k = torch.randint(-64, 65, (1, 2, 32, 16)) / 8
    shifted = k + torch.randint(-99, 100, (1, 2, 1, 16)) / 4
    assert torch.equal(compute(form, q, k, v, "f16"), compute(form, q, shifted, v, "f16"))


def test_smoothing_halves_the_error_of_biased_keys():
    form = Form(32, 32, causal=False)
    q, k, v = padded(1, 2, 33, 32), biased(1, 2, 64, 32), padded(1, 2, 64, 32)
    exact = attention(q.double(), k.double(), v.double(), None, None, 0.2, False, 0)
    memory = pack(form, k, v, 33, "f16")
    smooth = compute(form, q, k, v, "f16", packed=memory)
    scales = k.abs().amax(-1) / 127
    keys = torch.zeros(2, 128, 32, dtype=torch.int8)
    keys[:, :64] = (k / scales[..., None]).round()[0].to(torch.int8)
    rough = dict(memory, keys8=keys.flatten(), key_scales=torch.nn.functional.pad(scales[0], (0, 64)).flatten())
    assert error(smooth, exact) < 0.5 * error(compute(form, q, k, v, "f16", packed=rough), exact)


def test_caches_and_masks():
    form = Form(16, 16, 2, k="bf16", v="bf16", past=True, mask="float")
    q, k, v = padded(1, 4, 18, 16), padded(1, 2, 48, 16, dtype="bf16"), padded(1, 2, 48, 16, dtype="bf16")
    k[:, :, 38:], v[:, :, 38:] = torch.nan, torch.nan
    past, mask = torch.tensor(20), torch.randn(1, 4, 1, 48)
    mask[..., 3] = -torch.inf
    y = compute(form, q, k, v, "fp8", mask, past)
    held = (q.double(), k[:, :, :38].double(), v[:, :, :38].double(), mask.double(), past, 0.2, True, 0)
    assert error(y, attention(*held)) <= ALLOWED["fp8"]
    assert error(y, attention_int8(*held)) <= ALLOWED["fp8"]


ARITHMETIC = [("sm_80", "f16"), ("sm_89", "fp8"), ("sm_90", "fp8")]
LATER = [("sm_86", "f16"), ("sm_100", "fp8"), ("sm_120", "fp8")]


@pytest.mark.parametrize(("arch", "values"), ARITHMETIC)
def test_machine_code(arch, values):
    form = Form(64, 64, 4, y="bf16", q="bf16", k="bf16", v="bf16")
    builds(family.packing(form, values), (arch,))
    builds(family.kernel(form, values, family.space(form, values, arch)[0], ("y", "q")), (arch,))


@pytest.mark.parametrize("operand", ["tree", "shared", "listed"])
def test_operands_that_it_does_not_take(operand):
    with pytest.raises(ValueError, match="takes no tree of queries, shared keys or listed blocks"):
        family.kernel(Form(64, 64, **{operand: True}), "fp8", SMALL)


def test_float8_needs_sm_89():
    form = Form(64, 64)
    with pytest.raises(CompileError, match="attention_int8 for sm_80"):
        builds(family.kernel(form, "fp8", SMALL), ("sm_80",))


@pytest.mark.nightly
@pytest.mark.parametrize(("arch", "values"), ARITHMETIC + LATER)
@pytest.mark.parametrize("d", [64, 128])
def test_machine_code_of_all_tiles(d, arch, values):
    form = Form(d, d, 4, windowed=True, capped=True, mask="bool", past=True)
    builds(family.summary(form), (arch,))
    for tiles in family.space(form, values, arch):
        assert build(family.kernel(form, values, tiles), arch).shared <= SHARED[arch]
