"""Kernels over rows on GPUs: norms, softmax, rotary positions, the best token and drawn ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sylvester.codegen import gpu_norms as family
from sylvester.codegen.gpu_kernel import paired
from sylvester.compiler import ops
from sylvester.compiler.sampling import LEAST, Sampling
from tests.gpu import builds, run
from tests.test_gpu_attention import DTYPES, flat, padded, strides_of


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("n", "dtype", "summed"), [(37, "f32", False), (300, "bf16", True), (5000, "f32", True)])
def test_norms(kind, n, dtype, summed):
    x, other = (torch.randn(5, n).to(DTYPES[dtype]) * 3 + 1 for _ in range(2))
    x = torch.cat((x, x), 1)[:, :n]
    weight, bias = torch.randn(n), torch.randn(n)
    y, total = torch.empty_like(other), torch.empty_like(other)
    made = family.norm(kind, n, dtype, weight="f32", bias="f32" if kind == "layer" else None, summed=summed)
    given = {"y": y, "total": total, "x": x, "other": other, "weight": weight, "bias": bias, "rows": 5, "n": n}
    given["x_row"] = x.stride(0)
    given["eps"] = 1e-3
    run(made, family.norm_grid(n, 5), **{name: given[name] for name in made.types})
    source = x + other if summed else x
    if summed:
        assert torch.equal(total, source)
    if kind == "rms":
        expected = ops.rms_norm(source.double(), weight.double(), 1e-3)
    else:
        expected = F.layer_norm(source.double(), (n,), weight.double(), bias.double(), 1e-3)
    tolerance = 1e-5 if dtype == "f32" else 2e-2
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_norm_without_weight():
    x, y = torch.randn(3, 64), torch.empty(3, 64)
    run(family.norm("rms", 64, "f32"), family.norm_grid(64, 3), y=y, x=x, rows=3, n=64, x_row=64, eps=1e-6)
    torch.testing.assert_close(y, ops.rms_norm(x, None, 1e-6))


def test_rows_too_long_for_a_norm():
    with pytest.raises(ValueError, match="rows of 40000 values, expected at most 32768"):
        family.norm("rms", 40000, "f32")


@pytest.mark.parametrize("n", [1, 77, 40000])
def test_softmax(n):
    x = torch.randn(3, n) * 4
    x[0, n // 2] = -torch.inf if n > 1 else 0.0
    x[2] -= 1e4
    y, made = torch.empty(3, n), family.softmax(n, "f32", "f32")
    given = {"y": y, "x": x, "rows": 3, "n": n}
    run(made, family.softmax_grid(n, 3), **{name: given[name] for name in made.types})
    torch.testing.assert_close(y.double(), x.double().softmax(-1), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize(("d", "rotary", "batches"), [(24, 24, 1), (20, 12, 2)])
def test_rope(interleaved, halved, d, rotary, batches):
    x, y = padded(2, 3, 5, d), padded(2, 3, 5, d)
    angles = torch.randn(batches, 5, rotary // 2)
    whole = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    used = (angles if halved else whole).contiguous()
    given = {
        "y": flat(y), "x": flat(x), "cos": used.cos(), "sin": used.sin(), "total": 30, "heads": 3, "rows": 5,
        **strides_of("y", y), **strides_of("x", x), "angle_row": used.shape[-1],
        "angle_batch": used.stride(0) if batches > 1 else 0,
    }  # fmt: skip
    made = family.rope(d, rotary, "f32", "f32", "f32", interleaved=interleaved, halved=halved)
    run(made, family.rope_grid(30), **{name: given[name] for name in made.types})
    expected = ops.rope(x.double(), whole.cos().double(), whole.sin().double(), interleaved)
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-6)


def best(x):
    ids, parts = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x), family.PARTS, dtype=torch.int64)
    first, second = family.best()
    run(first, (len(x), family.PARTS), parts=parts, x=x, n=x.shape[1], stride=x.stride(0))
    run(second, (len(x),), ids=ids, parts=parts)
    return ids


def test_the_best_is_the_first_of_equals():
    x = torch.randn(4, 3001).round()
    x[1] = 0.0
    x[1, 5:] = -0.0
    x[2] = -torch.inf
    x[3, 2000], x[3, 2500] = torch.nan, torch.inf
    found = best(x)
    assert torch.equal(torch.where(found < 0, -1 - found, found), x.argmax(-1))
    assert (found < 0).tolist() == [False, False, True, True], "the host is told of what is not finite"


SAMPLINGS = [
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.5, top_p=0.8),
    Sampling(0.9, top_k=40, top_p=0.6),
    Sampling(1e-33),
    Sampling(2.0, top_k=1),
]


def drawn(sampling, x, uniform):
    ids, (rows, n) = torch.empty(len(x), dtype=torch.int64), x.shape
    made = family.draw(top_k=sampling.top_k is not None, top_p=sampling.top_p is not None, read=64)
    run(
        made, (rows,), ids=ids, x=x, uniform=uniform.view(torch.int64), n=n, stride=n,
        temperature=max(sampling.temperature, LEAST), top_k=sampling.top_k or 0, top_p=sampling.top_p or 0.0,
    )  # fmt: skip
    return ids.numpy()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_drawn_as_on_the_host(sampling):
    rows, n = 12, 150
    x = torch.randn(rows, n) * 3
    x[1] = x[1].round()
    x[2, 10:20] = -torch.inf
    uniform = torch.rand(rows, dtype=torch.float64)
    found = drawn(sampling, x, uniform)
    expected = sampling.pick(x.numpy(), np.zeros((rows, 0), np.int64), uniform.numpy())
    assert np.where(found < 0, expected, found).tolist() == expected.tolist()
    assert (found < 0).sum() <= 1


def test_what_rounding_decides_is_left_to_the_host():
    x = torch.zeros(4, 100)
    x[0, 3] = torch.nan
    x[1] = -torch.inf
    x[2, 7] = torch.inf
    x[3] = -100.0
    x[3, :4] = torch.tensor([0.0, -0.5, -1.0, -1.5])
    uniform = torch.rand(4, dtype=torch.float64)
    assert (drawn(Sampling(1.0), x, uniform) < 0).tolist() == [True, True, True, False]
    weights = x[3, :4].double().exp()
    edge = float(weights[:2].sum() / weights.sum())
    tied = Sampling(1.0, top_p=edge + 1e-6)
    found = drawn(tied, x[3:].repeat(16, 1), torch.rand(16, dtype=torch.float64))
    assert {-3} <= {*found.tolist()} <= {0, 1, -3}, "the third token may be in the nucleus, or not"


BUILT = {
    "rms norm": family.norm("rms", 4096, "bf16", weight="bf16", summed=True),
    "layer norm": family.norm("layer", 768, "f32", weight="f32", bias="f32"),
    "softmax": family.softmax(1000, "f32", "bf16"),
    "long softmax": family.softmax(50000, "f32", "f32"),
    "rope": family.rope(128, 128, "bf16", "bf16", "f32"),
    "rope of two": paired(family.rope(64, 64, "f32", "f32", "f32"), family.APART),
    "best": family.best()[0],
    "draw": family.draw(top_k=True, top_p=True),
}


@pytest.mark.parametrize(("name", "arch"), [(name, ("sm_80", "sm_89", "sm_90")[i % 3]) for i, name in enumerate(BUILT)])
def test_machine_code(name, arch):
    builds(BUILT[name], (arch,))


@pytest.mark.nightly
@pytest.mark.parametrize("name", BUILT)
def test_machine_code_for_every_architecture(name):
    builds(BUILT[name])
    builds(family.best()[1])
