"""Linear layers on GPUs against float64: every stored weight, norms and rounding before, gates and residuals after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sylvester.codegen.gpu_matmul import (
    SIZES,
    Linear,
    Norm,
    Tile,
    aligned_of,
    finish,
    gemv,
    gemv_group,
    grid,
    kernel,
    parts_bytes,
)
from sylvester.codegen.gpu_rows import candidates, quantize_grid
from sylvester.codegen.gpu_rows import quantize_rows as rows_kernel
from sylvester.compiler.errors import CompileError
from sylvester.compiler.quantized_rows import float8_rows, quantize_rows
from tests.gpu import builds, run
from tests.gpu_linears import DTYPES, norm_types, normalised, problem, result

RMS, LAYER = Norm("rms", 1e-6, "fp32"), Norm("layer", 1e-5, "fp32", "fp32")
FORMS = {
    "float32": Linear("fp32", "fp32", "fp32", precision="ieee"),
    "bfloat16, gated": Linear("fp32", "bf16", "fp32", bias="fp32", activation="silu", gated=True, residual="fp32"),
    "float16, after a norm": Linear("fp16", "fp16", "fp32", norm=RMS, activation="gelu"),
    "float8 by a step": Linear("fp32", "fp8e4nv", "fp32", rounding="step", bias="fp32"),
    "float8, rows rounded": Linear("fp32", "fp8e4nv", "fp32", rounding="rows", norm=RMS, gated=True, activation="silu"),
    "float8 rows": Linear("fp8e4nv", "fp8e4nv", "fp32", rounding="given", activation="relu"),
    "int8 rows": Linear("i8", "i8", "fp32", rounding="given", bias="fp32", residual="fp32"),
    "int8, rows rounded": Linear("fp32", "i8", "fp32", rounding="rows", norm=LAYER, activation="gelu_tanh"),
    "int8 in groups, rows of 4 bits": Linear("fp32", "i8", "fp32", group=64, rounding="rows", bits=4),
    "int8, a step": Linear("fp32", "i8", "fp32", rounding="step", gated=True, activation="gelu"),
    "int8, float rows": Linear("fp32", "i8", "fp32", precision="ieee"),
    "int4 rows": Linear("i8", "i4", "fp32", group=32, rounding="given", gated=True, activation="silu"),
    "int4, rows rounded": Linear("fp32", "i4", "fp32", group=64, scales="bf16", rounding="rows", norm=RMS),
    "int4, float rows": Linear("fp16", "i4", "fp32", group=32),
    "int3 rows": Linear("i8", "i3", "fp32", group=32, rounding="given"),
    "int3, float rows": Linear("fp32", "i3", "fp32", group=128, precision="ieee"),
}
QUICK = ("float16, after a norm", "float8, rows rounded", "int8 rows", "int8, a step", "int4, float rows", "int3 rows")
"""Left to the night: forms that differ from these by what products of many rows are tested with."""


def close(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in float32 of unit products, and rounding of inputs that is the same on both sides."""
    torch.testing.assert_close(y.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_products(name: str):
    linear = FORMS[name]
    arguments, expected = problem(linear, 17, 18, 104)
    close(result(linear, Tile(16, 16, 64), arguments, 18), expected)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in FORMS]
)
def test_products_of_a_few_rows(name: str):
    linear = FORMS[name]
    arguments, expected = problem(linear, 3, 5, 104)
    close(result(linear, Tile(1, 8, 64), arguments, 5, rows_at_once=True), expected)


@pytest.mark.parametrize(("name", "rows_at_once"), [("bfloat16, gated", False), ("int4, rows rounded", True)])
def test_parts_of_the_depth_are_added_in_order(name: str, rows_at_once: bool):
    linear = FORMS[name]
    arguments, expected = problem(linear, 2, 9, 104)
    close(result(linear, Tile(16, 8, 32, splits=3), arguments, 9, rows_at_once=rows_at_once), expected)


def test_tiles_share_columns_and_rows_of_any_stride():
    linear = Linear("bf16", "bf16", "bf16", bias="bf16")
    m, n, k = 70, 40, 32
    arguments, expected = problem(linear, m, n, k)
    made = kernel(linear, Tile(16, 16, 16, group_m=2), k)
    assert made.constants["EVEN"]
    wide = torch.randn(m, k + 5).bfloat16()
    wide[:, :k] = arguments.pop("x")
    y = torch.zeros(m, n + 3, dtype=torch.bfloat16)
    sizes = {"m": m, "n": n, "k": k, "x_row": k + 5, "w_row": k, "y_row": n + 3, "residual_row": 0}
    run(made, grid(Tile(16, 16, 16), m, n), x=wide, y=y, **arguments, **sizes)
    torch.testing.assert_close(y[:, :n].double(), expected, atol=1e-2, rtol=2**-8)
    assert not y[:, n:].any()


@pytest.mark.parametrize(("k", "norm"), [(300, None), (300, RMS), (8192 + 96, None)])
def test_rows_become_float8(k: int, norm: Norm | None):
    m = 5
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    x[1], x[2, 7] = 0, torch.nan
    linear = Linear("fp32", "fp8e4nv", "fp32", rounding="rows", norm=norm)
    held = {name: torch.randn(k) for name in norm_types(linear)}
    numbers, scales = torch.empty(m, k, dtype=torch.float8_e4m3fn), torch.empty(m)
    run(rows_kernel("fp32", k, norm, numbers="fp8e4nv"), quantize_grid(m, k), x=x, numbers=numbers, scales=scales,
        **held, m=m, k=k, x_row=k, numbers_row=k)  # fmt: skip
    expected, scale = float8_rows(normalised(linear, x.double(), held))
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(scales[kept, None], scale[kept], rtol=1e-5, atol=0)
    assert (numbers.float() * scales[:, None])[2].isnan().any()
    if norm is None:
        assert torch.equal(numbers[kept].view(torch.uint8) & 127, expected[kept].view(torch.uint8) & 127)
    assert (numbers[kept].float() == expected[kept].float()).double().mean() > 0.995


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("norm", [None, RMS, LAYER], ids=["none", "rms", "layer"])
def test_rows_are_rounded(bits: int, norm: Norm | None):
    m, k = 5, 300
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    x[1] = 0
    linear = Linear("fp32", "i8", "fp32", rounding="rows", norm=norm)
    held = {name: torch.randn(k).to(DTYPES[t]) for name, t in norm_types(linear).items()}
    numbers, scales = torch.empty(m, k, dtype=torch.int8), torch.empty(m)
    run(rows_kernel("fp32", k, norm, bits), quantize_grid(m, k), x=x, numbers=numbers, scales=scales, **held,
        m=m, k=k, x_row=k, numbers_row=k)  # fmt: skip
    wide = normalised(linear, x.double(), held)
    expected, scale = quantize_rows(wide, bits)
    torch.testing.assert_close(scales[:, None], scale, rtol=1e-5, atol=0)
    assert ((numbers - expected).abs() <= 1).all()
    assert (numbers == expected).double().mean() > 0.995


def test_candidates_of_rows():
    found = candidates("bf16", 4096, RMS)
    assert found[0] == rows_kernel("bf16", 4096, RMS)
    assert len({made.key for made in found}) == 3


def test_rows_by_a_step_are_cut():
    x, step = torch.randn(40, 33).bfloat16(), torch.tensor([0.01])
    numbers, scales = torch.empty(40, 33, dtype=torch.int8), torch.empty(40)
    run(rows_kernel("bf16", 33, step=True), quantize_grid(40, 33), x=x, numbers=numbers, scales=scales, step=step,
        m=40, k=33, x_row=33, numbers_row=33)  # fmt: skip
    assert torch.equal(scales, step.expand(40))
    assert torch.equal(numbers.float(), quantize_rows(x, 8, step)[0])


@pytest.mark.parametrize("norm", [None, Norm("layer", 1e-5, "fp32", "fp32")], ids=["none", "layer"])
def test_long_rows_are_read_in_parts(norm: Norm | None):
    k = 8192 + 96
    x, numbers, scales = torch.randn(2, k) + 1, torch.empty(2, k, dtype=torch.int8), torch.empty(2)
    linear = Linear("fp32", "i8", "fp32", rounding="rows", norm=norm)
    held = {name: torch.randn(k) for name in norm_types(linear)}
    run(rows_kernel("fp32", k, norm), quantize_grid(2, k), x=x, numbers=numbers, scales=scales, **held,
        m=2, k=k, x_row=k, numbers_row=k)  # fmt: skip
    expected, scale = quantize_rows(normalised(linear, x.double(), held))
    torch.testing.assert_close(scales[:, None], scale, rtol=1e-5, atol=0)
    assert ((numbers - expected).abs() <= 1).all()
    assert (numbers == expected).double().mean() > 0.995


ALIGNED = aligned_of(dict.fromkeys(SIZES, 4096) | {"m": 1})
BUILT = {
    "bfloat16": (Linear("bf16", "bf16", "bf16", bias="bf16", gated=True, activation="silu"), Tile(128, 64, 64, 8)),
    "int8": (Linear("i8", "i8", "bf16", rounding="given", residual="bf16"), Tile(128, 128, 64, 8)),
    "int4": (Linear("bf16", "i4", "bf16", group=32), Tile(64, 64, 32)),
}


@pytest.mark.parametrize("name", BUILT)
def test_machine_code(name: str):
    linear, tile = BUILT[name]
    builds(kernel(linear, tile, 4096, ALIGNED))
    builds(gemv(linear, Tile(1, 8, 256), 1, 4096, ALIGNED), ("sm_90",))
    builds(gemv_group(linear.plain, Tile(1, 8, 256), 1, 4096), ("sm_80",))


def test_rows_of_any_length_are_read_by_narrow_loads():
    linear = Linear("bf16", "bf16", "bf16")
    sizes = {"n": 4096, "k": 100, "x_row": 100, "w_row": 112}
    made = kernel(linear, Tile(16, 32, 32), 100, aligned_of(sizes))
    assert made.aligned == ("x", "w", "y", "n", "w_row")
    builds(made, ("sm_80",))


def test_machine_code_of_rows_and_sums():
    builds(rows_kernel("bf16", 4096, RMS))
    builds(rows_kernel("bf16", 14336, LAYER), ("sm_90",))
    builds(finish(Linear("bf16", "bf16", "bf16", gated=True, activation="gelu"), 4, ALIGNED), ("sm_80",))


def test_float8_has_no_machine_code_for_ampere():
    made = kernel(FORMS["float8 by a step"], Tile(64, 64, 64), 512, ALIGNED)
    builds(made, ("sm_89", "sm_90"))
    builds(gemv(FORMS["float8, rows rounded"], Tile(1, 8, 256), 1, 4096, ALIGNED), ("sm_89", "sm_90"))
    builds(rows_kernel("fp32", 4096, RMS, numbers="fp8e4nv"), ("sm_89", "sm_90"))
    with pytest.raises(CompileError, match="fp8e4nv"):
        builds(made, ("sm_80",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Linear("fp32", "i2", "fp32"), "a weight in 'i2'"),
        (lambda: Linear("fp32", "bf16", "fp32", group=32), "groups of 32"),
        (lambda: Linear("fp32", "bf16", "fp32", rounding="rows"), "rounded rows for a weight in bf16"),
        (lambda: Linear("fp32", "fp8e4nv", "fp32"), "floats for an fp8 weight, expected rounded rows"),
        (lambda: Linear("i8", "i8", "fp32"), "x in 'i8'"),
        (lambda: Linear("fp32", "i8", "fp32", bits=16, rounding="rows"), "rows of 16 bits"),
        (lambda: gemv(FORMS["float32"], Tile(1, 8, 64), 5, 64), "5 rows"),
        (lambda: kernel(FORMS["int8 rows"], Tile(16, 16, 64), 1 << 18), "a depth of 262144"),
        (lambda: rows_kernel("i8", 64), "rows in 'i8'"),
        (lambda: gemv_group(BUILT["bfloat16"][0], Tile(1, 8, 64), 1, 64), "nothing after their bias"),
    ],
)
def test_what_there_is_not(wrong: Callable[[], object], message: str):
    with pytest.raises(CompileError, match=message):
        wrong()


def test_scratch_of_split_products():
    assert parts_bytes(FORMS["float32"], 1, 3, 5) == 0
    assert parts_bytes(FORMS["bfloat16, gated"], 2, 3, 5) == 240
