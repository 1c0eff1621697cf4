"""Dialect ops over low-bit weights against exact integers in numpy, for odd shapes, and as part of a program."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.cost import node_cost
from sylvester.compiler.ops import Op
from sylvester.compiler.packing import packed3, packed4, unpacked3, unpacked4
from sylvester.compiler.program import Program, value
from sylvester.compiler.quantization import round_bf16, round_fp8, round_fp16, round_int3, round_int4, round_int8
from sylvester.compiler.quantized_ops import ROWS_AT_ONCE
from sylvester.compiler.quantized_rows import FLOAT8, LARGEST, quantize_rows
from sylvester.compiler.weights import ParameterStore
from tests.programs import ops, program

Pack = Callable[[Tensor], Tensor]


def divided(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values / scale to the nearest whole number, ties to even; 0 where the scale is 0."""
    return np.where(scale == 0, 0, np.rint(values / np.where(scale == 0, np.float32(1), scale))).astype(np.int64)


def rows_of(x: Tensor, bits: int = 8, step: Tensor | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Quantisation of rows in numpy, float32 throughout as in the op: numbers and scales, two of each for 16 bits."""
    values, most = x.numpy().astype(np.float32), np.float32(7 if bits == 4 else 127)
    if step is not None:
        return [(np.clip(divided(values, step.numpy()), -int(most), int(most)), step.numpy().astype(np.float64))]
    scale = np.abs(values).max(-1, keepdims=True) / most
    numbers = divided(values, scale)
    found = [(numbers, scale.astype(np.float64))]
    if bits == 16:
        rest, second = (values - numbers * scale.astype(np.float64)).astype(np.float32), scale / np.float32(254)
        found.append((divided(rest, second), second.astype(np.float64)))
    return found


def exact(x: Tensor, numbers: np.ndarray, scales: Tensor, bits: int = 8, step: Tensor | None = None) -> np.ndarray:
    """Integer sums per group, the last one perhaps shorter, then scales, in float64."""
    k, groups, total = numbers.shape[1], scales.shape[1], 0.0
    size = k if groups == 1 else next(g for g in (32, 64, 128) if -(-k // g) == groups)
    for rows, scale in rows_of(x, bits, step):
        parts = [
            np.einsum("...k,nk->...n", *(a[..., i : i + size] for a in (rows, numbers))) for i in range(0, k, size)
        ]
        total = total + (np.stack(parts, -1) * scales.numpy().astype(np.float64)).sum(-1) * scale
    return total


def nibbles(packed: Tensor) -> np.ndarray:
    values = packed.numpy()
    return np.stack((values % 16, values // 16), -1).reshape(len(values), -1).astype(np.int64) - 8


def threes(packed: Tensor) -> np.ndarray:
    """Two planes: the low bits of four numbers in a byte, then the high bits of eight."""
    n, columns = packed.shape
    bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little").astype(np.int64)
    low, high = bits[:, : columns // 3 * 16].reshape(n, -1, 2), bits[:, columns // 3 * 16 :]
    return low[..., 0] + 2 * low[..., 1] + 4 * high - 4


WEIGHTS = {
    dialect.linear_w8: (8, torch.int8, lambda packed: packed.numpy().astype(np.int64)),
    dialect.linear_w4: (4, torch.uint8, nibbles),
    dialect.linear_w3: (3, torch.uint8, threes),
}
"""Bits of a weight, dtype that holds it, and its numbers."""


def drawn(op: Op, n: int, k: int) -> tuple[Tensor, np.ndarray]:
    """A random weight as it is stored, and its numbers."""
    bits, dtype, numbers = WEIGHTS[op]
    limits = torch.iinfo(dtype)
    stored = torch.randint(limits.min, limits.max + 1, (n, k * bits // 8), dtype=dtype)
    return stored, numbers(stored)


@pytest.mark.parametrize(
    ("rows", "n", "k", "groups"), [(1, 1, 32, 1), (3, 37, 192, 3), (7, 5, 16384, 1), (2, 9, 384, 3)]
)
def test_int8_is_the_exact_integer_product(rows: int, n: int, k: int, groups: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k))
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n, groups) + 0.5

    found = dialect.linear_w8(x, weight, scales)

    np.testing.assert_allclose(found.numpy(), exact(x, weight.numpy(), scales), rtol=2e-7)


def test_int8_of_the_largest_numbers_is_exact() -> None:
    x, weight = torch.ones(1, 16384), torch.full((2, 16384), -128, dtype=torch.int8)
    x[0, 5] = 1 / 127

    found = dialect.linear_w8(x.double(), weight, torch.ones(2, 1))

    scale = float(torch.tensor(1.0) / 127)
    assert found.tolist() == [[-128 * (127 * 16383 + 1) * scale] * 2]


@pytest.mark.parametrize(("rows", "n", "k", "groups"), [(1, 1, 32, 1), (3, 37, 192, 3), (5, 33, 256, 2), (2, 9, 96, 3)])
def test_int4_is_the_exact_integer_product(rows: int, n: int, k: int, groups: int) -> None:
    x = torch.randn(rows, k)
    weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.randn(n, groups)

    found = dialect.linear_w4(x, weight, scales)

    expected = exact(x, nibbles(weight), scales)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    ("rows", "n", "k", "groups"), [(1, 1, 32, 1), (3, 37, 192, 3), (5, 33, 104, 4), (2, 9, 136, 2), (4, 5, 328, 1)]
)
@pytest.mark.parametrize("op", WEIGHTS, ids=lambda op: op.name)
def test_rows_of_every_width_are_exact(op: Op, rows: int, n: int, k: int, groups: int, bits: int) -> None:
    x, scales = torch.randn(rows, k) * torch.logspace(-3, 3, rows)[:, None], torch.randn(n, groups)
    stored, numbers = drawn(op, n, k)

    found = op(x, stored, scales, None, bits).double().numpy()

    expected = exact(x, numbers, scales, bits)
    assert (np.abs(found - expected) <= 1e-6 * np.abs(expected).max(-1, keepdims=True)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("op", WEIGHTS, ids=lambda op: op.name)
def test_rows_of_a_stored_scale_are_cut(op: Op, bits: int) -> None:
    x, scales, step = torch.randn(5, 96), torch.rand(7, 3), torch.tensor([1.2 / 127 if bits == 8 else 1.2 / 7])
    stored, numbers = drawn(op, 7, 96)
    bias = torch.randn(7)

    found = op(x, stored, scales, bias, bits, step).double().numpy()

    expected = exact(x, numbers, scales, bits, step) + bias.double().numpy()
    assert (x.abs() > 1.2).any()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert op(x, stored, scales, bias, bits, torch.zeros(1)).equal(bias.expand(5, 7))


def test_rows_of_sixteen_bits_are_nearly_those_of_the_input() -> None:
    x = torch.randn(9, 300) * torch.logspace(-6, 6, 9)[:, None]

    numbers, scale = quantize_rows(x, 16)

    assert numbers.abs().max() <= LARGEST[16]
    assert numbers.equal(numbers.round())
    assert ((numbers * scale - x).abs() <= x.abs().amax(-1, keepdim=True) * 2.0**-15.9).all()


@pytest.mark.parametrize(("bits", "step"), [(5, None), (2, None), (16, torch.ones(1))])
def test_rows_of_other_widths_are_refused(bits: int, step: Tensor | None) -> None:
    with pytest.raises(ValueError, match=f"rows of {bits} bits.*, expected 4, 8, or 16 without"):
        dialect.linear_w8(torch.ones(1, 32), torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 1), None, bits, step)


def test_steps_for_several_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a step of shape \[2\], expected \[1\]"):
        quantize_rows(torch.ones(2, 32), 8, torch.ones(2))


@pytest.mark.parametrize(("pack", "unpack", "zero"), [(packed4, unpacked4, 8), (packed3, unpacked3, 4)])
def test_packing_keeps_every_number(pack: Pack, unpack: Pack, zero: int) -> None:
    numbers = torch.randint(-zero, zero, (37, 104), dtype=torch.int8)

    assert unpack(pack(numbers)).equal(numbers)
    assert pack(numbers[5:9]).equal(pack(numbers)[5:9])
    for wrong, message in (
        (numbers[:, :103], "columns"),
        (numbers[0], "matrix"),
        (numbers + zero, f"expected -{zero}"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(wrong)


def test_fields_of_three_bits_fill_two_planes_from_the_lowest_bit() -> None:
    numbers = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]])

    assert packed3(numbers).tolist() == [[0b11100100, 0b11100100, 0b11110000]]


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
        dialect.linear_fp16: (round_fp16(torch.randn(4, 64)),),
        dialect.linear_fp8: round_fp8(torch.randn(4, 64)),
        dialect.linear_w8: round_int8(torch.randn(4, 64)),
        dialect.linear_w4: round_int4(torch.randn(4, 64)),
        dialect.linear_w3: round_int3(torch.randn(4, 64)),
    }
    for op, stored in cases.items():
        torch.testing.assert_close(op(x, *stored, bias), op(x, *stored) + bias, rtol=1e-6, atol=1e-6)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert op(x.to(dtype), *stored, bias.to(dtype)).dtype == dtype


def test_rows_of_zeros_give_the_bias_and_ties_round_to_even() -> None:
    weight, scales = round_int8(torch.randn(4, 32))
    assert dialect.linear_w8(torch.zeros(2, 32), weight, scales).tolist() == [[0.0] * 4] * 2

    numbers, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert numbers.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]
    assert scale.tolist() == [[1.0]]


def test_rows_that_are_not_finite_stay_so() -> None:
    weight, scales = round_int8(torch.randn(4, 32))
    x = torch.randn(2, 32)
    x[0, 3] = float("nan")

    found = dialect.linear_w8(x, weight, scales)

    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_tall_weights_are_taken_in_slices() -> None:
    weight, scales = round_int8(torch.randn(2 * ROWS_AT_ONCE + 5, 32))
    x = torch.randn(2, 32)

    np.testing.assert_allclose(
        dialect.linear_w8(x, weight, scales).numpy(), exact(x, weight.numpy(), scales), rtol=1e-6, atol=1e-5
    )


def test_low_half_of_a_byte_is_the_even_column() -> None:
    assert unpacked4(torch.tensor([[0xF0, 0x81]], dtype=torch.uint8)).tolist() == [[-8, 7, -7, 0]]


@pytest.mark.parametrize(("k", "groups"), [(64, 3), (64, 4), (512, 2), (104, 3)])
def test_groups_of_other_sizes_are_refused(k: int, groups: int) -> None:
    weight = torch.zeros(2, k, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"{groups} groups along a depth of {k}, expected one, or groups of"):
        dialect.linear_w8(torch.zeros(1, k), weight, torch.ones(2, groups))


def test_widening_is_numbers_times_scales() -> None:
    weight, scales = torch.randint(-128, 128, (5, 64), dtype=torch.int8), torch.randn(5, 2)
    assert dialect.dequantize_w8(weight, scales).equal(weight * scales.repeat_interleave(32, 1))
    packed = torch.randint(0, 256, (5, 32), dtype=torch.uint8)
    assert dialect.dequantize_w4(packed, scales).equal(unpacked4(packed) * scales.repeat_interleave(32, 1))
    threes = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    assert dialect.dequantize_w3(threes, scales).equal(unpacked3(threes) * scales.repeat_interleave(32, 1))
    odd = torch.randint(-128, 128, (5, 41), dtype=torch.int8)
    assert dialect.dequantize_w8(odd, scales).equal(odd * scales.repeat_interleave(32, 1)[:, :41])
    assert dialect.widen_bf16(torch.ones(2, 3).bfloat16()).dtype == torch.float32
    assert dialect.widen_fp16(torch.ones(2, 3).half()).dtype == torch.float32
    assert dialect.dequantize_fp8(odd.to(FLOAT8), scales[:, :1]).equal(odd.to(FLOAT8).float() * scales[:, :1])


def mixed() -> Program:
    """One program with every op, over inputs with a symbolic number of rows."""

    def function(x: Tensor, short: Tensor, w8: Tensor, s8: Tensor, w4: Tensor, s4: Tensor, *w3: Tensor) -> Tensor:
        y = dialect.linear_bf16(x, short) + dialect.linear_w8(x, w8, s8) + dialect.linear_w4(x, w4, s4)
        y = y + dialect.linear_w3(x, *w3[:2], None, 4, w3[2]) + dialect.linear_fp8(x, *w3[3:5])
        y = y + dialect.linear_fp16(x, w3[5])
        tables = dialect.widen_bf16(short) + dialect.dequantize_w8(w8, s8) + dialect.dequantize_w4(w4, s4)
        tables = tables + dialect.dequantize_w3(*w3[:2]) + dialect.dequantize_fp8(*w3[3:5]) + dialect.widen_fp16(w3[5])
        return torch.cat((y, x @ tables.T), -1)

    weight = torch.randn(6, 64)
    (w8, s8), (w4, s4), (w3, s3) = round_int8(weight), round_int4(weight, 64), round_int3(weight, 64)
    stored = {"short": round_bf16(weight), "w8": w8, "s8": s8, "w4": w4, "s4": s4, "w3": w3, "s3": s3}
    stored["step"] = torch.tensor([0.25])
    stored["w8f"], stored["s8f"] = round_fp8(weight)
    stored["h16"] = round_fp16(weight)
    return program(function, torch.randn(3, 5, 64), weights=stored)


def test_a_program_keeps_symbolic_rows_and_survives_saving(tmp_path) -> None:
    made = mixed()
    rows = [str(n) for n in value(made.main.placeholders("input")[0]).shape[:2]]
    assert [str(n) for n in value(made.main.calls(dialect.linear_w4.target)[0]).shape] == [*rows, "6"]

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
            "float16": torch.randn(3, 5).half(),
            "float8": torch.randn(3, 5).to(FLOAT8),
            "whole": torch.randint(-128, 128, (3, 5), dtype=torch.int8),
            "packed": torch.randint(0, 256, (3, 5), dtype=torch.uint8),
        }
    )
    store.save(tmp_path / "w.safetensors")

    loaded = ParameterStore.load(tmp_path / "w.safetensors")

    assert all(loaded[key].equal(tensor) and loaded[key].dtype == tensor.dtype for key, tensor in store.items())
    assert loaded.nbytes == 3 * 5 * 7


def test_costs_count_the_bytes_that_are_stored() -> None:
    costs = {n.target: node_cost(n) for n in mixed().main.calls()}
    rows, k, n = 3 * 5, 64, 6
    moved = 4 * rows * (k + n)

    assert costs[dialect.linear_w4.target].flops == 2 * rows * k * n
    assert costs[dialect.linear_bf16.target].bytes == moved + 2 * n * k
    assert costs[dialect.linear_w8.target].bytes == moved + n * k + 4 * n
    assert costs[dialect.linear_fp8.target].bytes == moved + n * k + 4 * n
    assert costs[dialect.linear_fp16.target].bytes == moved + 2 * n * k
    assert costs[dialect.dequantize_fp8.target].bytes == n * k + 4 * n + 4 * n * k
    assert costs[dialect.linear_w4.target].bytes == moved + n * k // 2 + 4 * n
    assert costs[dialect.linear_w3.target].flops == 2 * rows * k * n
    assert costs[dialect.linear_w3.target].bytes == moved + 3 * n * k // 8 + 4 * n + 4
    assert costs[dialect.dequantize_w4.target].bytes == n * k // 2 + 4 * n + 4 * n * k
    assert costs[dialect.dequantize_w3.target].bytes == 3 * n * k // 8 + 4 * n + 4 * n * k


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
