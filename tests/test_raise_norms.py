"""Norms written out in arithmetic, in the spellings people use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sylvester.compiler.pipeline import Pipeline
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.raise_norms import RaiseNorms
from tests.programs import ops, program, reasons

RAISE = Pipeline((Canonicalize(), RaiseNorms()))
WEIGHT, BIAS = torch.randn(8), torch.randn(8)


def llama(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * wide.to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def by_hand(x: Tensor, w: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=2, keepdim=True) + 1e-5) * w


def reciprocal(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * (1 / (x.square().mean(-1, True) + 1e-5).sqrt()))


@pytest.mark.parametrize("norm", [llama, gemma, by_hand, reciprocal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(norm: Callable[..., Tensor], dtype: torch.dtype) -> None:
    built = program(norm, torch.randn(2, 5, 8).to(dtype), weights={"w": WEIGHT.to(dtype)})

    after, ledger = RAISE.run(built)

    assert set(ops(after)) <= {"sylvester.rms_norm", "aten.add.Tensor", "aten.to.dtype"}
    assert ledger.rows[-1].changes.counts() == {"RmsNorm": 1}


def test_rms_norm_matches_float64_at_another_shape() -> None:
    after = RAISE(program(llama, torch.randn(2, 5, 8), weights={"w": WEIGHT}))
    x = torch.randn(3, 1, 8)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * WEIGHT.double()

    torch.testing.assert_close(after.run("forward", {"x0": x})["y0"].double(), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_without_weight() -> None:
    after = RAISE(program(lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), torch.randn(2, 5, 8)))

    assert ops(after) == ["sylvester.rms_norm"]
    assert after.main.calls()[0].args[1] is None


@pytest.mark.parametrize("eps", [1e-3, None])
def test_torch_rms_norm(eps: float | None) -> None:
    after, ledger = RAISE.run(program(nn.RMSNorm(8, eps), torch.randn(2, 5, 8)))

    assert ops(after) == ["sylvester.rms_norm"]
    assert after.main.calls()[0].args[2] == (eps or torch.finfo(torch.float32).eps)
    assert ledger.rows[-1].changes.counts() == {"TorchRmsNorm": 1}


def test_torch_rms_norm_over_two_axes_is_refused() -> None:
    after, ledger = RAISE.run(program(nn.RMSNorm((5, 8), 1e-3), torch.randn(2, 5, 8)))

    assert ops(after) == ["aten.rms_norm"]
    assert reasons(ledger) == ["normalises over [5, 8], expected the last axis only"]


def test_a_weight_per_token_stays_a_product() -> None:
    def gated(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w

    after = RAISE(program(gated, torch.randn(2, 5, 8), weights={"w": torch.randn(5, 1)}))

    assert ops(after) == ["sylvester.rms_norm", "aten.mul.Tensor"]


def test_a_shared_inner_value_is_refused() -> None:
    def leaky(x: Tensor) -> Tensor:
        scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return x * scale + scale

    after, ledger = RAISE.run(program(leaky, torch.randn(2, 5, 8)))

    assert "sylvester.rms_norm" not in ops(after)
    assert reasons(ledger) == ["an inner value is also used outside the pattern"]


def test_another_axis_is_refused() -> None:
    def columns(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-2, keepdim=True) + 1e-6)

    after, ledger = RAISE.run(program(columns, torch.randn(2, 5, 8)))

    assert "sylvester.rms_norm" not in ops(after)
    assert reasons(ledger) == ["expected the constant -1, found -2"]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "variance",
    [
        lambda x, centred: centred.pow(2).mean(-1, keepdim=True),
        lambda x, centred: (centred * centred).mean(-1, keepdim=True),
        lambda x, centred: x.var(-1, keepdim=True, unbiased=False),
        lambda x, centred: x.var(-1, keepdim=True, correction=0),
    ],
)
def test_layer_norm(variance: Callable[[Tensor, Tensor], Tensor], scaled: bool) -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt(variance(x, centred) + 1e-5)
        return y * w + b if scaled else y

    after = RAISE(program(norm, torch.randn(2, 5, 8), weights={"w": WEIGHT, "b": BIAS}))
    x = torch.randn(4, 3, 8)

    assert ops(after) == ["aten.layer_norm"]
    torch.testing.assert_close(after.run("forward", {"x0": x})["y0"], norm(x, WEIGHT, BIAS), rtol=1e-5, atol=1e-5)


def test_the_unbiased_variance_is_no_layer_norm() -> None:
    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)

    assert "aten.layer_norm" not in ops(RAISE(program(norm, torch.randn(2, 5, 8))))


def test_a_cast_to_integers_is_no_part_of_a_norm() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        whole = (x * 4).to(torch.int32).float()
        return whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    after = RAISE(program(norm, torch.randn(2, 5, 8), weights={"w": WEIGHT}))

    assert ops(after) == ["aten.mul.Tensor", "aten.to.dtype", "aten.to.dtype", "sylvester.rms_norm"]
