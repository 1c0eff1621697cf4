"""Rounding of weights: integers against numpy, searched scales against brute force, formats that do not exist."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.clipping import FACTORS, POWER, clipped
from sylvester.compiler.packing import unpacked3, unpacked4
from sylvester.compiler.quantization import GRIDS, round_int3, round_int4, round_int8, round_weight, widest

WIDEN = {8: dialect.dequantize_w8, 4: dialect.dequantize_w4, 3: dialect.dequantize_w3}
FORMATS = [(8, 0), (8, 32), (8, 128), (4, 32), (4, 64), (3, 32), (3, 128)]


def scaled_rows(k: int) -> Tensor:
    return torch.randn(9, k) * torch.logspace(-3, 3, 9)[:, None]


@pytest.mark.parametrize("group", [0, 32, 64])
def test_int8_numbers(group: int) -> None:
    weight = scaled_rows(192)

    numbers, scales = round_int8(weight, group)

    split = weight.numpy().reshape(9, -1, group or 192)
    expected = np.abs(split).max(-1) / np.float32(127)
    if group:
        expected = torch.from_numpy(expected).bfloat16().float().numpy()
    assert np.array_equal(scales.numpy(), expected)
    rounded = np.clip(np.rint(split / expected[..., None]), -127, 127)
    assert np.array_equal(numbers.numpy(), rounded.reshape(9, 192))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rounded", "unpacked", "end"), [(round_int4, unpacked4, 8), (round_int3, unpacked3, 4)])
def test_numbers_of_either_sign(rounded, unpacked, end: int, group: int) -> None:
    weight = scaled_rows(384)

    packed, scales = rounded(weight, group)

    split = weight.numpy().reshape(9, -1, group)
    extreme = np.take_along_axis(split, np.abs(split).argmax(-1)[..., None], -1)[..., 0]
    expected = torch.from_numpy(extreme / np.float32(-end)).bfloat16().float().numpy()
    assert np.array_equal(scales.numpy(), expected)
    whole = np.clip(np.rint(split / expected[..., None]), -end, end - 1).reshape(9, 384)
    found = unpacked(packed).numpy()
    assert np.array_equal(found, whole)
    assert all((g == -end).any() for g in found.reshape(-1, group))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_the_last_group_may_be_shorter(bits: int, group: int) -> None:
    weight = scaled_rows(104)

    numbers, scales = round_weight(weight, bits, group)

    assert scales.shape == (9, -(-104 // group) if group else 1)
    tail = weight[:, 104 // group * group :] if group else weight
    alone = torch.cat([tail, torch.zeros(9, -tail.shape[1] % 8)], 1)
    expected = WIDEN[bits](*round_weight(alone, bits, group))[:, : tail.shape[1]]
    assert WIDEN[bits](numbers, scales)[:, -tail.shape[1] :].equal(expected)


@pytest.mark.parametrize("bits", GRIDS)
def test_rows_of_zeros_and_slices_of_tall_weights(bits: int) -> None:
    weight = torch.randn(dialect.ROWS_AT_ONCE + 3, 32)
    weight[-1] = 0

    for scaling in (widest, clipped):
        numbers, scales = round_weight(weight, bits, 32, scaling)
        tail = round_weight(weight[-3:], bits, 32, scaling)
        assert numbers[-3:].equal(tail[0])
        assert scales[-3:].equal(tail[1])
        found = WIDEN[bits](numbers, scales)
        assert found[-1].equal(torch.zeros(32))
        assert float((found - weight).norm() / weight.norm()) < 4 / 2**bits


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_nearest_is_within_half_a_step(bits: int, group: int) -> None:
    weight = torch.randn(6, 256, dtype=torch.float64).float()

    numbers, scales = round_weight(weight, bits, group)

    error = (WIDEN[bits](numbers, scales.double()) - weight.double()).abs()
    # The scale of a group is rounded to bfloat16, the near end of a lopsided grid lies a whole step short.
    steps = scales.double().abs().repeat_interleave(256 // scales.shape[1], 1)
    bound = 0.5 if bits == 8 else 1.0
    assert bool((error <= steps * (bound + 2.0**bits / 512)).all())


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_searched_scales_are_the_best_of_their_grid(bits: int, group: int) -> None:
    grid, weight = GRIDS[bits], torch.randn(4, 128).pow(3)

    _, scales = round_weight(weight, bits, group, clipped)

    ends = [grid.least] if grid.lopsided else [grid.most]
    for row, groups in zip(weight.double().numpy(), scales, strict=True):
        for values, found in zip(row.reshape(len(groups), -1), groups, strict=True):
            extreme = values[np.abs(values).argmax()] if grid.lopsided else np.abs(values).max()
            factors = [f / end for f, end in itertools.product(FACTORS, [*ends, grid.most])]
            tried = [torch.tensor(extreme * f).float() for f in factors]
            tried = [float(t.bfloat16() if group else t) for t in tried]
            least = min(_error(values, scale, grid) for scale in tried)
            assert _error(values, float(found), grid) <= least * (1 + 1e-5)


def _error(values: np.ndarray, scale: float, grid) -> float:
    whole = np.clip(np.rint(values / scale), grid.least, grid.most)
    return float((np.abs(whole * scale - values) ** POWER).sum())


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_searched_scales_are_never_worse(bits: int, group: int) -> None:
    weight = torch.randn(5, 256).pow(3)

    errors = []
    for scaling in (widest, clipped):
        wide = WIDEN[bits](*round_weight(weight, bits, group, scaling))
        errors.append((wide - weight).double().abs().pow(POWER).unflatten(1, (-1, group or 256)).sum(-1))

    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert bits == 8 or float(errors[1].sum()) < 0.97 * float(errors[0].sum())


@pytest.mark.parametrize(
    ("bits", "group", "k", "message"),
    [
        (5, 32, 96, r"whole numbers of 5 bits, expected one of \[8, 4, 3\]"),
        (8, 16, 96, r"int8 has groups of \(32, 64, 128\), found 16"),
        (4, 0, 96, r"int4 has groups of \(32, 64, 128\), found 0"),
        (3, 48, 96, r"int3 has groups of \(32, 64, 128\), found 48"),
        (4, 32, 33, "int4 has depths that are multiples of 2, found 33"),
        (3, 32, 44, "int3 has depths that are multiples of 8, found 44"),
    ],
)
def test_formats_that_do_not_exist(bits: int, group: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_weight(torch.zeros(2, k), bits, group)
