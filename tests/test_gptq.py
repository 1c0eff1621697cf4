"""GPTQ: less error than rounding on correlated inputs, checked against exhaustive search and a plain reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sylvester.compiler import gptq
from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.clipping import clipped
from sylvester.compiler.errors import CompileError
from sylvester.compiler.gptq import DAMPING, Hessian, round_gptq
from sylvester.compiler.packing import unpacked3, unpacked4
from sylvester.compiler.quantization import GRIDS, round_weight, widest

WIDEN = {8: dialect.dequantize_w8, 4: dialect.dequantize_w4, 3: dialect.dequantize_w3}
UNPACK = {8: lambda numbers: numbers, 4: unpacked4, 3: unpacked3}
FORMATS = [(8, 0), (8, 64), (4, 32), (4, 128), (3, 32), (3, 64)]


def correlated(rows: int, k: int) -> Tensor:
    """Inputs that mostly lie in a quarter of the directions, with columns of different size."""
    mixed = torch.randn(rows, k // 4) @ torch.randn(k // 4, k) / (k // 4) ** 0.5
    return (mixed + 0.1 * torch.randn(rows, k)) * torch.logspace(-1, 1, k)[torch.randperm(k)]


def hessian_of(*xs: Tensor) -> Hessian:
    found = Hessian(xs[0].shape[-1])
    for x in xs:
        found.add(x)
    return found


def output_error(x: Tensor, weight: Tensor, wide: Tensor) -> float:
    return float((x.double() @ (wide - weight).double().T).norm() / (x.double() @ weight.double().T).norm())


@pytest.mark.parametrize("scaling", [widest, clipped])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_error_on_correlated_inputs(bits: int, group: int, scaling) -> None:
    x, weight = correlated(900, 160), torch.randn(24, 160)

    prepared = hessian_of(x).prepared()
    fitted = round_gptq(weight, prepared, bits, group, scaling)
    nearest = round_weight(weight, bits, group, scaling)

    assert output_error(x, weight, WIDEN[bits](*fitted)) < 0.7 * output_error(x, weight, WIDEN[bits](*nearest))
    assert fitted[1].equal(nearest[1])
    again = round_gptq(weight, hessian_of(x).prepared(), bits, group, scaling)
    assert all(a.equal(b) for a, b in zip(fitted, again, strict=True))


def test_the_sum_over_slices_is_2_x_transposed_x() -> None:
    xs = [torch.randn(3, 500, 40), torch.randn(7, 40), torch.randn(1, 2, 600, 40)]

    found = hessian_of(*xs).sum

    rows = torch.cat([x.flatten(0, -2) for x in xs]).double()
    torch.testing.assert_close(found, 2 * rows.T @ rows, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("k", [1, 65, 300])
def test_the_factor_is_that_of_the_inverse(k: int) -> None:
    x = torch.randn(2 * k, k)
    h = hessian_of(x).sum

    prepared = hessian_of(x).prepared()

    h = (h + DAMPING * h.diagonal().mean() * torch.eye(k))[prepared.order][:, prepared.order]
    factor = prepared.factor
    assert factor.triu().equal(factor)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(h).float(), rtol=1e-4, atol=1e-6)


def test_columns_go_by_their_diagonal() -> None:
    x = torch.randn(50, 64)
    x[:, 7], x[:, 20], x[:, 33] = x[:, 7] * 100, x[:, 20] * 10, 0

    order = hessian_of(x).prepared().order.tolist()

    assert order[:2] == [7, 20]
    assert order[-1] == 33
    assert sorted(order) == list(range(64))


def plain_gptq(weight: Tensor, h: Tensor, scales: Tensor, bits: int) -> Tensor:
    """One column at a time with the inverse of what is left, in float64, without blocks or factors."""
    grid, w, left = GRIDS[bits], weight.double().clone(), list(range(len(h)))
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    found = torch.zeros_like(w)
    for column in torch.argsort(h.diagonal(), descending=True, stable=True).tolist():
        inverse, at = torch.linalg.inv(h[left][:, left]), left.index(column)
        found[:, column] = grid.nearest(w[:, column], scales[:, column])
        error = (w[:, column] - found[:, column] * scales[:, column]) / inverse[at, at]
        w[:, left] -= torch.outer(error, inverse[at])
        left.remove(column)
    return found


@pytest.mark.parametrize(("bits", "group", "block"), [(4, 32, 128), (4, 32, 16), (3, 32, 7), (8, 0, 16)])
def test_blocks_and_factors_change_nothing(bits: int, group: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    x, weight = correlated(300, 72), torch.randn(10, 72)
    h = hessian_of(x).sum

    packed, scales = round_gptq(weight, hessian_of(x).prepared(), bits, group, widest)

    columns = scales.double().repeat_interleave(group or 72, 1)[:, :72]
    expected = plain_gptq(weight, h, columns, bits)
    # Float32 may round a number on the edge the other way, which moves what follows in its row.
    agreement = (UNPACK[bits](packed).double() == expected).double().mean()
    assert float(agreement) > 0.99


def test_one_row_against_every_choice() -> None:
    """Of all roundings of 8 live columns to one of the two nearest numbers, GPTQ finds one of the best."""
    ranks, gains = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        x, weight = torch.zeros(100, 32), torch.zeros(1, 32)
        x[:, :8] = torch.randn(100, 2) @ torch.randn(2, 8) + 0.3 * torch.randn(100, 8)
        weight[:, :8] = torch.randn(8)
        packed, scales = round_gptq(weight, hessian_of(x).prepared(), 4, 32, widest)
        found = unpacked4(packed)[0, :8].double()
        scale, w = scales.double()[0, 0], weight[0, :8].double()
        floor = torch.floor(w / scale)
        ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64)
        choices = (floor + ups).clamp(-8, 7)
        errors = ((choices * scale - w) @ x[:, :8].double().T).square().sum(-1)
        error = float(((found * scale - w) @ x[:, :8].double().T).square().sum())
        nearest = GRIDS[4].nearest(w, scale)
        gains.append(error / float(((nearest * scale - w) @ x[:, :8].double().T).square().sum()))
        ranks.append(float((errors < error * (1 - 1e-6)).double().mean()))

    assert sum(ranks) / len(ranks) < 0.05
    assert sum(gains) / len(gains) < 0.7


def test_inputs_without_correlation_are_rounded_to_nearest() -> None:
    x, weight = torch.eye(64) * torch.linspace(1, 2, 64), torch.randn(5, 64)

    found = round_gptq(weight, hessian_of(x).prepared(), 4, 32, widest)

    assert all(a.equal(b) for a, b in zip(found, round_weight(weight, 4, 32), strict=True))


def test_columns_that_are_always_zero_are_rounded_to_nearest() -> None:
    x, weight = correlated(100, 64), torch.randn(5, 64)
    x[:, 10:20] = 0

    packed, scales = round_gptq(weight, hessian_of(x).prepared(), 4, 32, widest)

    nearest, _ = round_weight(weight, 4, 32)
    assert unpacked4(packed)[:, 10:20].equal(unpacked4(nearest)[:, 10:20])
    assert bool(scales.isfinite().all())
    silent, _ = round_gptq(weight, hessian_of(torch.zeros(9, 64)).prepared(), 4, 32, widest)
    assert silent.equal(nearest)


def test_fewer_rows_than_columns_need_damping_only() -> None:
    x, weight = torch.randn(5, 64), torch.randn(6, 64)

    found = round_gptq(weight, hessian_of(x).prepared(), 4, 32, widest)

    assert output_error(x, weight, WIDEN[4](*found)) < output_error(x, weight, WIDEN[4](*round_weight(weight, 4, 32)))


@pytest.mark.parametrize(("least", "definite"), [(-0.05, True), (-0.5, True), (-100.0, False)])
def test_a_matrix_that_is_not_definite_gets_more_damping_or_an_error(least: float, definite: bool) -> None:
    hessian = hessian_of(torch.randn(100, 32))
    values, vectors = torch.linalg.eigh(hessian.sum)
    values[0] = least * values.mean()
    hessian.sum = vectors @ torch.diag(values) @ vectors.T

    if definite:
        assert bool(hessian.prepared().factor.isfinite().all())
        return
    with pytest.raises(CompileError, match="is not positive definite"):
        hessian.prepared()


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(CompileError, match="inputs of the layer are not finite"):
        hessian_of(torch.full((3, 32), torch.nan)).prepared()
