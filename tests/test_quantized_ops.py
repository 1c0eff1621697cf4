"""Dialect ops over low-bit weights against exact integers in numpy, for odd shapes, and as part of a program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.cost import node_cost
from sylvester.compiler.program import Program, value
from sylvester.compiler.quantization import round_bf16, round_int4, round_int8
from sylvester.compiler.quantized_ops import ROWS_AT_ONCE, quantize_rows, unpacked
from sylvester.compiler.weights import ParameterStore
from tests.programs import ops, program


def int8_rows(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic quantisation of rows in numpy, float32 throughout as in the op."""
    values = x.numpy().astype(np.float32)
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    safe = np.where(scale == 0, np.float32(1), scale)
    return np.where(scale == 0, 0, np.rint(values / safe)).astype(np.int64), scale.astype(np.float64)


def exact(x: Tensor, numbers: np.ndarray, scales: Tensor) -> np.ndarray:
    """Integer sums per group, then scales, in float64."""
    rows, scale = int8_rows(x)
    groups = scales.shape[1]
    split = [a.reshape(*a.shape[:-1], groups, -1) for a in (rows, numbers.astype(np.int64))]
    sums = np.einsum("...gk,ngk->...ng", *split)
    return (sums * scales.numpy().astype(np.float64)).sum(-1) * scale


def nibbles(packed: Tensor) -> np.ndarray:
    values = packed.numpy()
    return np.stack((values % 16, values // 16), -1).reshape(len(values), -1).astype(np.int64) - 8


@pytest.mark.parametrize(
    ("rows", "n", "k", "groups"), [(1, 1, 32, 1), (3, 37, 192, 3), (7, 5, 16384, 1), (2, 9, 384, 3)]
)
def test_int8_is_the_exact_integer_product(rows: int, n: int, k: int, groups: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k))
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n, groups) + 0.5

    found = dialect.linear_w8a8(x, weight, scales)

    np.testing.assert_allclose(found.numpy(), exact(x, weight.numpy(), scales), rtol=2e-7)


def test_int8_of_the_largest_numbers_is_exact() -> None:
    x, weight = torch.ones(1, 16384), torch.full((2, 16384), -128, dtype=torch.int8)
    x[0, 5] = 1 / 127

    found = dialect.linear_w8a8(x.double(), weight, torch.ones(2, 1))

    scale = float(torch.tensor(1.0) / 127)
    assert found.tolist() == [[-128 * (127 * 16383 + 1) * scale] * 2]


@pytest.mark.parametrize(("rows", "n", "k", "groups"), [(1, 1, 32, 1), (3, 37, 192, 3), (5, 33, 256, 2), (2, 9, 96, 3)])
def test_int4_is_the_exact_integer_product(rows: int, n: int, k: int, groups: int) -> None:
    x = torch.randn(rows, k)
    weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.randn(n, groups)

    found = dialect.linear_w4a8(x, weight, scales)

    expected = exact(x, nibbles(weight), scales)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_bf16_rounds_both_operands_and_sums_wider() -> None:
    x, weight = torch.randn(3, 33), torch.randn(5, 33).bfloat16()

    expected = x.bfloat16().double() @ weight.double().T

    torch.testing.assert_close(dialect.linear_bf16(x, weight).double(), expected, rtol=1e-5, atol=1e-5)
    assert dialect.linear_bf16(x.double(), weight).dtype == torch.float64
    torch.testing.assert_close(dialect.linear_bf16(x.double(), weight), expected, rtol=1e-13, atol=1e-13)


def test_biases_are_added_and_the_result_has_the_type_of_the_rows() -> None:
    x, bias = torch.randn(2, 3, 64), torch.randn(4)
    cases = {
        dialect.linear_bf16: (round_bf16(torch.randn(4, 64)),),
        dialect.linear_w8a8: round_int8(torch.randn(4, 64)),
        dialect.linear_w4a8: round_int4(torch.randn(4, 64)),
    }
    for op, stored in cases.items():
        torch.testing.assert_close(op(x, *stored, bias), op(x, *stored) + bias, rtol=1e-6, atol=1e-6)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert op(x.to(dtype), *stored, bias.to(dtype)).dtype == dtype


def test_rows_of_zeros_give_the_bias_and_ties_round_to_even() -> None:
    weight, scales = round_int8(torch.randn(4, 32))
    assert dialect.linear_w8a8(torch.zeros(2, 32), weight, scales).tolist() == [[0.0] * 4] * 2

    numbers, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert numbers.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]
    assert scale.tolist() == [[1.0]]


def test_rows_that_are_not_finite_stay_so() -> None:
    weight, scales = round_int8(torch.randn(4, 32))
    x = torch.randn(2, 32)
    x[0, 3] = float("nan")

    found = dialect.linear_w8a8(x, weight, scales)

    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_tall_weights_are_taken_in_slices() -> None:
    weight, scales = round_int8(torch.randn(2 * ROWS_AT_ONCE + 5, 32))
    x = torch.randn(2, 32)

    np.testing.assert_allclose(
        dialect.linear_w8a8(x, weight, scales).numpy(), exact(x, weight.numpy(), scales), rtol=1e-6, atol=1e-5
    )


def test_low_half_of_a_byte_is_the_even_column() -> None:
    assert unpacked(torch.tensor([[0xF0, 0x81]], dtype=torch.uint8)).tolist() == [[-8, 7, -7, 0]]


@pytest.mark.parametrize(("k", "groups"), [(64, 3), (64, 4), (512, 2)])
def test_groups_of_other_sizes_are_refused(k: int, groups: int) -> None:
    weight = torch.zeros(2, k, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"{groups} groups along a depth of {k}, expected one, or groups of"):
        dialect.linear_w8a8(torch.zeros(1, k), weight, torch.ones(2, groups))


def test_widening_is_numbers_times_scales() -> None:
    weight, scales = torch.randint(-128, 128, (5, 64), dtype=torch.int8), torch.randn(5, 2)
    assert dialect.dequantize_w8(weight, scales).equal(weight * scales.repeat_interleave(32, 1))
    packed = torch.randint(0, 256, (5, 32), dtype=torch.uint8)
    assert dialect.dequantize_w4(packed, scales).equal(unpacked(packed) * scales.repeat_interleave(32, 1))
    assert dialect.widen_bf16(torch.ones(2, 3).bfloat16()).dtype == torch.float32


def mixed() -> Program:
    """One program with every op, over inputs with a symbolic number of rows."""

    def function(x: Tensor, short: Tensor, w8: Tensor, s8: Tensor, w4: Tensor, s4: Tensor) -> Tensor:
        y = dialect.linear_bf16(x, short) + dialect.linear_w8a8(x, w8, s8) + dialect.linear_w4a8(x, w4, s4)
        tables = dialect.widen_bf16(short) + dialect.dequantize_w8(w8, s8) + dialect.dequantize_w4(w4, s4)
        return torch.cat((y, x @ tables.T), -1)

    weight = torch.randn(6, 64)
    (w8, s8), (w4, s4) = round_int8(weight), round_int4(weight, 64)
    stored = {"short": round_bf16(weight), "w8": w8, "s8": s8, "w4": w4, "s4": s4}
    return program(function, torch.randn(3, 5, 64), weights=stored)


def test_a_program_keeps_symbolic_rows_and_survives_saving(tmp_path) -> None:
    made = mixed()
    rows = [str(n) for n in value(made.main.placeholders("input")[0]).shape[:2]]
    assert [str(n) for n in value(made.main.calls(dialect.linear_w4a8.target)[0]).shape] == [*rows, "6"]

    made.save(tmp_path / "saved")
    loaded = Program.load(tmp_path / "saved")

    assert ops(loaded) == ops(made)
    assert {k: v.dtype for k, v in loaded.weights.items()} == {k: v.dtype for k, v in made.weights.items()}
    x = torch.randn(2, 7, 64)
    assert loaded.run("forward", {"x0": x})["y0"].equal(made.run("forward", {"x0": x})["y0"])


def test_stores_keep_low_bit_tensors(tmp_path) -> None:
    store = ParameterStore(
        {
            "half": torch.randn(3, 5).bfloat16(),
            "whole": torch.randint(-128, 128, (3, 5), dtype=torch.int8),
            "packed": torch.randint(0, 256, (3, 5), dtype=torch.uint8),
        }
    )
    store.save(tmp_path / "w.safetensors")

    loaded = ParameterStore.load(tmp_path / "w.safetensors")

    assert all(loaded[key].equal(tensor) and loaded[key].dtype == tensor.dtype for key, tensor in store.items())
    assert loaded.nbytes == 3 * 5 * 4


def test_costs_count_the_bytes_that_are_stored() -> None:
    costs = {n.target: node_cost(n) for n in mixed().main.calls()}
    rows, k, n = 3 * 5, 64, 6
    moved = 4 * rows * (k + n)

    assert costs[dialect.linear_w4a8.target].flops == 2 * rows * k * n
    assert costs[dialect.linear_bf16.target].bytes == moved + 2 * n * k
    assert costs[dialect.linear_w8a8.target].bytes == moved + n * k + 4 * n
    assert costs[dialect.linear_w4a8.target].bytes == moved + n * k // 2 + 4 * n
    assert costs[dialect.dequantize_w4.target].bytes == n * k // 2 + 4 * n + 4 * n * k


def _shortened(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("masked", [True, False])
def test_attention_rounds_operands_and_weights(masked: bool) -> None:
    q, k, v = torch.randn(2, 4, 9, 7), torch.randn(2, 2, 11, 7), torch.randn(2, 2, 11, 5)
    mask = torch.rand(2, 1, 9, 11) < 0.7 if masked else None
    wide = [_shortened(x) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    scores = wide[0] @ wide[1].transpose(2, 3) * 0.3
    weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1)

    y = dialect.attention_bf16(q, k, v, mask, None, 0.3, False, 0)

    assert y.dtype == torch.float32
    expected = _shortened(weights.nan_to_num(0.0)) @ wide[2]
    assert (y - expected).norm() / expected.norm() < 3e-4
    exact = weights.nan_to_num(0.0) @ v.repeat_interleave(2, 1).double()
    assert (y - exact).norm() / exact.norm() > 5e-4


def test_attention_with_float64_stays_wide() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    wide = [_shortened(x) for x in (q, k, v)]
    weights = torch.softmax(wide[0] @ wide[1].transpose(2, 3), -1)

    y = dialect.attention_bf16(q, k, v, None, None, 1.0, False, 0)

    torch.testing.assert_close(y, _shortened(weights) @ wide[2], rtol=1e-14, atol=1e-14)
