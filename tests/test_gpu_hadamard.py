"""Rotations on GPUs against float64: powers of two, Paley's bases and products of them, rounded rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sylvester.codegen.gpu_hadamard import Hadamard, base, candidates, fuses, grid, kernel
from sylvester.compiler.errors import CompileError
from sylvester.compiler.hadamard import transform
from sylvester.compiler.quantized_rows import quantize_rows
from tests.gpu import TYPES, builds, run

NAMES = {dtype: name for dtype, name in TYPES.items()}


def rotated(rotation: Hadamard, x: Tensor, scales: Tensor | None = None) -> Tensor:
    rows, width = x.shape
    y = torch.zeros(rows, width + 3, dtype=torch.int8 if rotation.bits else x.dtype)
    held = {"scales": scales, "base": base(rotation.block)}
    sizes = {"blocks": rows * width // rotation.block, "x_row": width, "y_row": width + 3}
    given = {name: value for name, value in held.items() if value is not None}
    run(kernel(rotation), grid(rotation, rows), x=x, y=y, **given, **sizes)
    assert not y[:, width:].any()
    return y[:, :width]


@pytest.mark.parametrize(
    ("width", "block", "transposed"),
    [
        *((6, 1, False), (24, 8, False), (64, 64, False), (256, 256, False), (768, 256, False), (2048, 2048, False)),
        *(
            (8192, 8192, False),
            (40, 20, False),
            (72, 36, True),
            (60, 12, True),
            (240, 240, True),
            (768, 768, False),
            (5504, 5504, True),
        ),
        *((264, 264, True), (144, 144, False), (6144, 3072, False)),
    ],
)
def test_rotations(width: int, block: int, transposed: bool):
    x = torch.randn(3, width)
    expected = transform(x.double(), block, transposed)
    y = rotated(Hadamard("fp32", "fp32", width, block, transposed), x)
    torch.testing.assert_close(y.double(), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "block"), [(1536, 768), (7168, 7168), (16384, 8192)])
def test_short_floats_are_rounded_once(width: int, block: int, dtype: torch.dtype):
    x = torch.randn(2, width).to(dtype)
    expected = transform(x.double(), block)
    y = rotated(Hadamard(NAMES[dtype], NAMES[dtype], width, block), x)
    error = (y.double() - expected).abs()
    assert (error <= (expected.to(dtype).double() - expected).abs() + 2**-14).all()


@pytest.mark.parametrize(
    ("width", "block", "bits"), [(768, 768, 8), (7168, 7168, 8), (512, 128, 8), (1024, 1024, 4), (60, 20, 4)]
)
def test_rows_are_rounded_in_the_same_pass(width: int, block: int, bits: int):
    x = torch.randn(3, width) * torch.tensor([1.0, 0.0, 1e3])[:, None]
    scales = torch.empty(3)
    numbers = rotated(Hadamard("fp32", "i8", width, block, bits=bits), x, scales)
    expected, scale = quantize_rows(transform(x.double(), block), bits)
    torch.testing.assert_close(scales[:, None], scale, rtol=1e-5, atol=0)
    assert ((numbers - expected).abs() <= 1).all()
    assert (numbers == expected).double().mean() > 0.995


@pytest.mark.parametrize("width", [256, 5120])
def test_rows_are_rounded_by_a_step(width: int):
    x, step = torch.randn(3, width).bfloat16(), torch.tensor([0.01])
    numbers = rotated(Hadamard("bf16", "i8", width, width, bits=8, step=True), x, step)
    expected, _ = quantize_rows(transform(x.double(), width), 8, step)
    assert ((numbers - expected).abs() <= 1).all()
    assert (numbers == expected).double().mean() > 0.99
    assert numbers.max() == 127


def test_machine_code():
    builds(kernel(Hadamard("bf16", "bf16", 4096, 4096)))
    held = Hadamard("bf16", "i8", 14336, 14336, bits=8)
    assert held.axes == (28, 16, 32)
    builds(kernel(held), ("sm_90",))
    builds(kernel(Hadamard("fp32", "fp32", 128, 128)), ("sm_80",))


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize(
    "width", [36, 64, 80, 896, 1536, 3072, 4864, 5120, 8192, 8960, 11008, 14336, 18944, 28672, 57344, 65536]
)
def test_machine_code_of_widths(width: int, arch: str):
    for x in ("fp32", "bf16"):
        builds(kernel(Hadamard(x, x, width, width)), (arch,))
        if fuses(x, width, width):
            builds(kernel(Hadamard(x, "i8", width, width, bits=8)), (arch,))


@pytest.mark.parametrize("width", [64, 4096, 28672])
def test_candidates_are_distinct(width: int):
    rotation = Hadamard("bf16", "bf16", width, width)
    found = candidates(rotation)
    assert found[0] == kernel(rotation)
    assert 2 <= len({made.key for made in found}) == len(found) <= 6


def test_what_is_rounded_elsewhere():
    assert fuses("bf16", 14336, 14336)
    assert not fuses("bf16", 65536, 65536)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Hadamard("i8", "fp32", 64, 64), "a rotation of 'i8'"),
        (lambda: Hadamard("fp32", "i8", 64, 64), "to 'i8' of 0 bits"),
        (lambda: Hadamard("fp32", "fp32", 64, 48), "blocks of 48 in rows of 64"),
        (lambda: Hadamard("fp32", "i8", 65536, 65536, bits=8), "quantize_rows"),
    ],
)
def test_what_there_is_not(wrong: Callable[[], object], message: str):
    with pytest.raises(CompileError, match=message):
        wrong()
