"""Weights in float8 and float16: their arithmetic against float64, the pass, artefacts on an emulated GPU, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.quantization import round_fp8, round_fp16
from sylvester.compiler.quantized_rows import FLOAT8, float8_rows
from sylvester.passes.quantize import Quantize
from tests.programs import ops, program


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 32), (3, 37, 193), (7, 5, 4096)])
def test_fp8_is_the_exact_product_of_rounded_operands(rows: int, n: int, k: int) -> None:
    x, weight = torch.randn(rows, k) * torch.logspace(-3, 3, rows)[:, None], torch.randn(n, k)
    stored, scales = round_fp8(weight)

    found = dialect.linear_fp8(x, stored, scales).double()

    (numbers, x_scales), (w_numbers, w_scales) = by_hand(x), by_hand(weight)
    expected = numbers @ w_numbers.T * x_scales * w_scales.T
    assert stored.double().equal(w_numbers)
    assert scales.double().equal(w_scales)
    assert ((found - expected).abs() <= 1e-6 * expected.abs().amax(-1, keepdim=True)).all()
    exact = x.double() @ weight.double().T
    assert 1e-3 < float((found - exact).norm() / exact.norm()) < 0.06


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of float8 and scales of rows, in float64."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return to_float8((x / scale).double()), scale.double()


def to_float8(values: Tensor) -> Tensor:
    """To three bits of mantissa by hand: steps of an eighth of the power of two below, of 2^-9 below 2^-6."""
    power = torch.floor(torch.log2(values.abs().clamp_min(1e-300))).clamp_min(-6)
    step = torch.exp2(power - 3)
    return (torch.round(values / step) * step).clamp(-448, 448)


def test_float8_rows_have_every_number_and_ties_to_even() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    every = every[every.isfinite()]
    numbers, scale = float8_rows(every[None])
    assert scale.tolist() == [[1.0]]
    assert numbers.float()[0].equal(every)

    numbers, scale = float8_rows(torch.tensor([[448.0, 17.0, 19.0, -21.0, 2.0**-10, 3 * 2.0**-10], [0.0] * 6]))
    assert numbers.tolist() == [[448.0, 16.0, 20.0, -20.0, 0.0, 2.0**-8], [0.0] * 6]
    assert scale.tolist() == [[1.0], [0.0]]

    spoilt = torch.ones(3, 2)
    spoilt[:, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert dialect.linear_fp8(spoilt, *round_fp8(torch.ones(1, 2))).isnan().all()


def test_fp16_rounds_both_operands_and_sums_wider() -> None:
    x, weight = torch.randn(3, 33), torch.randn(5, 33).half()

    expected = x.half().double() @ weight.double().T

    torch.testing.assert_close(dialect.linear_fp16(x, weight).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dialect.linear_fp16(x.double(), weight), expected, rtol=1e-13, atol=1e-13)
    assert dialect.linear_fp16(torch.full((1, 33), 7e4), weight.abs()).isinf().all()
    with pytest.raises(ValueError, match="a value of 70000 in size, float16 holds at most 65504"):
        round_fp16(torch.tensor([[7e4]]))


def layers(count: int) -> Program:
    """Layers one after another, each after a tanh."""

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = F.linear(torch.tanh(x), weight)
        return x

    stored = {f"w{i}": torch.randn(64, 64) / 8 for i in range(count)}
    return program(function, torch.randn(2, 3, 64), weights=stored)


def test_weights_beyond_float16_are_refused_by_name() -> None:
    made = layers(1)
    made.weights["w0"][3, 5] = -65520.0

    with pytest.raises(CompileError, match=r"the weight 'w0' holds a value of 65520 in size, float16 .* 65504"):
        Pipeline((Quantize("fp16"),))(made)

    made.weights["w0"][3, 5] = -65504.0
    assert Pipeline((Quantize("fp16"),))(made).weights["w0.fp16"][3, 5] == -65504.0


def test_layers_have_short_floats_beside_whole_numbers() -> None:
    step = Quantize(4, method="mse", per_layer={"w0": "fp8", "w1": "fp16"})

    after, ledger = Pipeline((step,)).run(layers(3))

    assert ops(after)[1::2] == ["sylvester.linear_fp8", "sylvester.linear_fp16", "sylvester.linear_w4"]
    assert sorted(after.weights) == ["w0.fp8", "w0.scales", "w1.fp16", "w2.int4", "w2.scales"]
    assert ledger.rows[0].changes.notes == ["rounded to nearest, not by mse, as they are fp8: w0"]


def test_calibration_data_says_what_short_floats_lose() -> None:
    made = layers(2)
    step = Quantize("fp16", per_layer={"w0": "fp8"})
    plain = Pipeline((step,))(made)
    made.calibration = Calibration(tuple({"x0": torch.randn(2, 3, 64)} for _ in range(3)))

    after, ledger = Pipeline((step,)).run(made)

    assert all(after.weights[key].equal(tensor) for key, tensor in plain.weights.items())
    found = {f.where: f.value for f in ledger.rows[0].changes.figures if f.name == "sqnr dB"}
    assert 27 < found["w0"] < 34
    assert 65 < found["w1"] < 80
