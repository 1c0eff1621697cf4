"""Layers that train in 8 bits: exact without rounding, errors by level, what is kept, graphs of gradients, refusals."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_ops import LEVELS, halo_linear, halo_product, rounded_weight
from sylvester.compiler.halo_quantise import FORMATS, Rounded, quantise
from sylvester.compiler.halo_rotate import padded, restore_tokens, rotate, rotate_tokens

HADAMARD = torch.ops.sylvester.hadamard.default


def results(layer, x, weight, bias, given):
    """Y and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = layer(*leaves)
    return [y, *torch.autograd.grad(y, leaves, given)]


def errors(found, expected):
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("width", [64, 96, 97, 192, 768, 1600])
def test_levels_are_exact_without_rounding(width):
    weight, bias = torch.randn(40, width), torch.randn(40)
    for tokens in (1, 7, 33):
        x, given = torch.randn(2, tokens, width), torch.randn(2, tokens, 40)
        expected = results(F.linear, x, weight, bias, given)
        for level in range(len(LEVELS)):
            found = results(lambda *a, at=level: halo_linear(*a, at, "exact"), x, weight, bias, given)
            assert max(errors(found, expected)) <= 1e-5


def test_exact_gradients_in_float64():
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 12), (3, 12), (3,)))
    for level in range(len(LEVELS)):
        assert torch.autograd.gradcheck(lambda *a, at=level: halo_linear(*a, at, "exact"), (x, weight, bias))


def outliers(tokens=512, width=768):
    """A layer with 6 outlier channels in x and 4 outlier tokens in the gradient."""
    x, weight, given = torch.randn(tokens, width), torch.randn(width, width), torch.randn(tokens, width)
    x[:, torch.randperm(width)[:6]] *= 30
    given[torch.randperm(tokens)[:4]] *= 30
    return x, weight, torch.zeros(width), given


def test_rotations_spread_outliers():
    x, weight, bias, given = outliers()
    expected = results(F.linear, x, weight, bias, given)
    f, e, g = zip(
        *(
            errors(results(lambda *a, at=n: halo_linear(*a, at, "int8"), x, weight, bias, given), expected)[:3]
            for n in range(4)
        ),
        strict=True,
    )
    assert f[1] <= 0.3 * f[0]
    assert e[1] > 0.9 * e[0]
    assert e[2] <= 0.3 * e[1]
    assert g[1] < g[0]
    assert g[3] <= 0.3 * g[2]


@pytest.mark.parametrize(("format", "most"), [("int8", 0.02), ("fp8", 0.05), ("int4", 0.35)])
def test_formats(format, most):
    x, weight, bias, given = outliers(64, 96)
    expected = results(F.linear, x, weight, bias, given)
    found = results(lambda *a: halo_linear(*a, 3, format), x, weight, bias, given)
    assert max(errors(found, expected)[:3]) <= most


def kept(level, format="int8", dtype=torch.bfloat16, frozen=False):
    """Bytes that a layer keeps of x [32, 96], and of its weight [48, 96]."""
    x, weight = torch.randn(32, 96, dtype=dtype, requires_grad=True), torch.randn(48, 96, dtype=dtype)
    sizes: Counter[torch.Size] = Counter()

    def keep(tensor):
        sizes[tensor.shape] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if frozen:
            halo_product(x, rounded_weight(weight, level, format), None, level, format)
        else:
            halo_linear(x, weight.requires_grad_(), None, level, format)
    return sizes[x.shape], sizes[weight.shape]


@pytest.mark.parametrize("level", range(4))
def test_what_is_kept_has_8_bits(level):
    assert kept(level) == (32 * 96, 48 * 96)
    assert kept(level, frozen=True) == (0, 48 * 96)


def step(level, format="int8"):
    def traced(x, weight, bias):
        y = torch.ops.sylvester.halo_linear(x, weight, bias, level, format)
        return torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    return traced


@pytest.mark.parametrize(("level", "forward", "backward"), [(0, 0, 0), (1, 2, 2), (2, 2, 4), (3, 4, 4)])
def test_rotations_are_nodes_of_the_graph_of_gradients(level, forward, backward):
    leaves = [torch.randn(*s, requires_grad=True) for s in ((5, 12), (8, 12), (8,))]
    graph = make_fx(step(level), tracing_mode="fake")(*leaves).graph
    assert len(graph.find_nodes(op="call_function", target=HADAMARD)) == forward + backward
    assert len(graph.find_nodes(op="call_function", target=torch.ops.sylvester.halo_mm.default)) == 3


def test_a_graph_of_gradients_computes_them():
    leaves = [torch.randn(*s, requires_grad=True) for s in ((5, 12), (8, 12), (8,))]
    for found, expected in zip(make_fx(step(3))(*leaves)(*leaves), step(3)(*leaves), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_rounded_apart_with_one_scale_are_the_weight(format):
    weight, x = torch.randn(12, 24), torch.randn(5, 24)
    whole = rounded_weight(weight, 2, format)
    scale = torch.stack([rounded_weight(part, 2, format).scale for part in weight.split(4)]).amax()
    parts = [rounded_weight(part, 2, format, scale).values for part in weight.split(4)]
    assert torch.equal(scale, whole.scale)
    assert torch.equal(torch.cat(parts).float(), whole.values.float())
    expected = halo_linear(x, weight, None, 2, format)
    assert torch.equal(halo_product(x, whole, None, 2, format), expected)
    assert torch.equal(halo_linear(x, torch.empty(12, 24), None, 2, format, "", *whole), expected)


def test_a_rounded_weight_still_gets_its_gradient():
    x, weight = torch.randn(5, 24), torch.randn(12, 24, requires_grad=True)
    whole = rounded_weight(weight.detach(), 2, "int8")
    (found,) = torch.autograd.grad(halo_linear(x, weight, None, 2, "int8", "", *whole).sum(), weight)
    (expected,) = torch.autograd.grad(halo_linear(x, weight, None, 2, "int8").sum(), weight)
    assert torch.equal(found, expected)


def test_rounding():
    x = torch.tensor([[-1.0, 0.6, 0.0], [0.3, 1.0, 0.004]])
    assert quantise(x, "int8").values.tolist() == [[-127, 76, 0], [38, 127, 1]]
    assert quantise(x, "int4").values.tolist() == [[-7, 4, 0], [2, 7, 0]]
    assert quantise(x, "int8", torch.tensor(0.5 / 127)).values.tolist() == [[-127, 127, 0], [76, 127, 1]]
    assert quantise(x, "fp8", torch.tensor(0.5 / 448)).values.float().abs().max() == 448
    for zeros in (torch.zeros(2, 3), torch.zeros(0, 3), torch.full((2, 3), 1e-38)):
        assert quantise(zeros, "int8").wide().tolist() == torch.zeros(zeros.shape).tolist()
    assert Rounded(torch.tensor([2], dtype=torch.int8), torch.tensor(0.5)).wide().tolist() == [1.0]


@pytest.mark.parametrize("tokens", [0, 1, 5, 33, 100])
def test_tokens_are_filled_up_and_restored(tokens):
    x = torch.randn(tokens, 6, dtype=torch.float64)
    turned = rotate_tokens(x)
    assert turned.shape == (padded(tokens), 6)
    torch.testing.assert_close(turned.norm(), x.norm())
    torch.testing.assert_close(restore_tokens(turned, tokens), x)


def test_padding_is_short():
    assert all(n <= padded(n) <= 1.2 * n + 3 for n in range(1, 3000))


def test_gradient_of_a_rotation():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, x)
    assert torch.autograd.gradgradcheck(rotate, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_cannot_be_rounded_name_the_layer(bad):
    found = "a NaN or an infinity"
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    y = halo_linear(x, weight, None, 2, "int8", "block.0.up")
    given = torch.ones_like(y)
    given[1, 1] = bad
    with pytest.raises(CompileError, match=f"the gradient of the output of the layer 'block.0.up' holds {found}"):
        y.backward(given)
    with pytest.raises(CompileError, match=f"the input of the layer 'block.0.up' holds {found}"):
        halo_linear(x * bad, weight, None, 0, "int8", "block.0.up")
    with pytest.raises(CompileError, match=f"the weight of a layer holds {found}"):
        halo_linear(x, weight * bad, None, 0, "int8")


def test_refusals():
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    for level in (4, -1, True, 1.5):
        with pytest.raises(ValueError, match="expected one of"):
            halo_linear(x, weight, None, level, "int8")
    with pytest.raises(ValueError, match="format is 'int9', expected one of"):
        halo_linear(x, weight, None, 1, "int9")
    with pytest.raises(ValueError, match=r"the layer 'up' takes 8 features, got an input of \[3, 6\]"):
        halo_linear(x[:, :6], weight, None, 1, "int8", "up")
    y = halo_linear(x, weight, None, 1, "int8").square().sum()
    (first,) = torch.autograd.grad(y, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
