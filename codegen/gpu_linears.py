"""Linear layers and products as launches on a GPU: for one row, for a few and for many, whichever fits the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sylvester.codegen import gpu_hadamard, gpu_rows
from sylvester.codegen.elementwise import call, pointwise, scaled
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_lowering import NO_LIMIT, Given, GpuLowering, When, gpu_lowers, over, stored
from sylvester.codegen.gpu_matmul import MOST_ROWS, Linear, gemv, kernel
from sylvester.codegen.gpu_matmul_space import gemv_tiles, tiles
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.lazy import Buffer, Lazy, Pointer, of_buffer
from sylvester.codegen.linears import row_pointer
from sylvester.codegen.lowering import Fact
from sylvester.codegen.scalar import Expr
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.quantized_ops import group_size

aten, dialect = torch.ops.aten, torch.ops.sylvester
MANY = 512
"""Rows that the kernel for many is cut up for."""


@gpu_lowers(aten.linear.default)
def linear(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None) -> Lazy:
    if len(weight.shape) != 2 or (bias is not None and bias.shape != weight.shape[:1]) or x.dtype != "f32":
        raise Unsupported("cuda has no kernel for a linear layer over a vector, a bias that broadcasts, or float64")
    return _product(lowering, fact, Linear("fp32", "fp32", "fp32", bias="fp32" if bias else ""), x, weight, bias)


@gpu_lowers(dialect.linear_bf16.default)
def linear_bf16(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None) -> Lazy:
    return _product(lowering, fact, Linear("fp32", "bf16", "fp32", bias="fp32" if bias else ""), x, weight, bias)


def _low_bit(kind: str) -> None:
    @gpu_lowers(getattr(dialect, f"linear_w{kind[1]}").default)
    def low_bit(
        lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, scales: Lazy, bias: Lazy | None = None,
        bits: int = 8, step: Lazy | None = None,
    ) -> Lazy:  # fmt: skip
        """Rows are rounded as they are read for a few, and once before the product for many."""
        k = static(x.shape[-1])
        group = group_size(k, static(scales.shape[1]))
        form = Linear(
            "fp32", kind, "fp32", group=0 if group == k else group,
            rounding="none" if bits == 16 else "rows" if step is None else "step",
            bits=8 if bits == 16 else bits, bias="fp32" if bias else "",
        )  # fmt: skip
        others = {"scales": stored(lowering, scales)} | ({"x_scales": stored(lowering, step)} if step else {})
        return _product(lowering, fact, form, x, weight, bias, others)


for _kind in ("i8", "i4", "i3"):
    _low_bit(_kind)


def static(n: Index) -> int:
    if n.constant is None:
        raise Unsupported("cuda has no kernel for a linear layer with a symbolic number of features")
    return n.constant


def _product(
    lowering: GpuLowering,
    fact: Fact,
    form: Linear,
    x: Lazy,
    weight: Lazy,
    bias: Lazy | None,
    others: Mapping[str, Pointer] | None = None,
) -> Lazy:
    n, k, m = static(fact.shape[-1]), static(x.shape[-1]), product(x.shape[:-1])
    rows, stride = row_pointer(lowering, x)
    y = lowering.buffer("arena", fact.shape, "f32")
    given: dict[str, Given] = {"x": rows, "w": stored(lowering, weight), "y": Pointer(y.name, index(0))}
    given |= others or {}
    given |= {"bias": stored(lowering, bias)} if bias else {}
    sizes = {"m": m, "n": index(n), "k": index(k), "x_row": stride, "w_row": weight.shape[1], "y_row": index(n)}
    arguments: dict[str, Given] = {**given, **sizes, "residual_row": index(0)}
    aligned = _aligned(n, k, sizes)
    tile = replace(gemv_tiles(form, n, k)[0], splits=1)
    for least, most in ((1, 1), (2, MOST_ROWS)):
        if _may(m, least, most):
            made = gemv(form, tile, most, k, aligned)
            _launch(lowering, made, (over(index(n), tile.n), index(1)), arguments, y, (m, least, most))
    if _may(m, MOST_ROWS + 1, NO_LIMIT):
        _many(lowering, form, arguments, y, m, n, k, aligned)
    return of_buffer(y)


def _many(
    lowering: GpuLowering,
    form: Linear,
    arguments: dict[str, Given],
    y: Buffer,
    m: Index,
    n: int,
    k: int,
    aligned: tuple[str, ...],
) -> None:
    when = (m, MOST_ROWS + 1, NO_LIMIT)
    if form.rounding in ("rows", "step"):
        arguments = arguments | _rounded(lowering, form, arguments, m, k, when)
        form = replace(form, x="i8", rounding="given")
    tile = replace(tiles(form, MANY, n, k)[0], splits=1)
    grid = (over(m, tile.m) * over(index(n), tile.n), index(1))
    _launch(lowering, kernel(form, tile, k, aligned), grid, arguments, y, when)


def _rounded(
    lowering: GpuLowering,
    form: Linear,
    arguments: Mapping[str, Given],
    m: Index,
    k: int,
    when: When,
) -> dict[str, Given]:
    """Rounds the rows into memory; a step is read from the scales and copied there for every row."""
    numbers, scales = lowering.buffer("arena", (m, index(k)), "i8"), lowering.buffer("arena", (m,), "f32")
    places = {"numbers": Pointer(numbers.name, index(0), "i8"), "scales": Pointer(scales.name, index(0))}
    given = {"x": arguments["x"], **places, "m": m, "k": index(k)}
    given |= {"x_row": arguments["x_row"], "numbers_row": index(k)}
    step = form.rounding == "step"
    if step:
        given["scales"] = arguments["x_scales"]
    made = gpu_rows.quantize_rows("fp32", k, bits=form.bits, step=step)
    grid = (over(m, gpu_rows.rows_of(k)),)
    _launch(lowering, made, grid, given, numbers, when, *(() if step else (scales,)))
    if step:
        source = arguments["x_scales"]
        assert isinstance(source, Pointer)
        spread = of_buffer(lowering.plan.buffers[source.buffer])
        places["scales"] = stored(lowering, Lazy((m,), "f32", lambda _: spread.load([index(0)])))
    return {"x": places["numbers"], "x_scales": places["scales"], "x_row": index(k)}


def _launch(
    lowering: GpuLowering,
    made: Kernel,
    grid: tuple[Index, ...],
    arguments: Mapping[str, Given],
    y: Buffer,
    when: When,
    *others: Buffer,
) -> None:
    lowering.launch(made, grid, arguments, writes=(y.name, *(b.name for b in others)), when=when)


def _may(m: Index, least: int, most: int) -> bool:
    return m.constant is None or least <= m.constant <= most


def _aligned(n: int, k: int, sizes: Mapping[str, Index]) -> tuple[str, ...]:
    """Weights and results begin on 64 bytes; sizes are multiples of 16 where they are known to be."""
    known = [name for name, size in sizes.items() if size.constant is not None and size.constant % 16 == 0]
    return ("w", "y", "scales", "bias", *known)


@gpu_lowers(dialect.hadamard.default)
def hadamard(lowering: GpuLowering, fact: Fact, x: Lazy, block: int, transposed: bool = False) -> Lazy:
    if block == 1:
        return x
    width, m = static(x.shape[-1]), product(x.shape[:-1])
    rotation = gpu_hadamard.Hadamard("fp32", "fp32", width, block, transposed)
    rows, stride = row_pointer(lowering, x)
    y = lowering.buffer("arena", fact.shape, "f32")
    arguments: dict[str, Given] = {"x": rows, "y": Pointer(y.name, index(0)), "x_row": stride}
    arguments |= {"y_row": index(width), "blocks": m * (width // block)}
    matrix = gpu_hadamard.base(block)
    if matrix is not None:
        arguments["base"] = Pointer(lowering.constant(matrix, f"hadamard.{len(matrix)}"), index(0), "i8")
    held = rotation.blocks * rotation.rows
    grid = (over(m * (width // block), rotation.blocks), index(-(-held // rotation.tile[0])))
    lowering.launch(gpu_hadamard.kernel(rotation), grid, arguments, writes=(y.name,))
    return of_buffer(y)


@gpu_lowers(aten.matmul.default, aten.bmm.default, aten.mm.default)
def product_of_activations(lowering: GpuLowering, fact: Fact, a: Lazy, b: Lazy) -> Lazy:
    """Sums of generated loops."""
    row, column = len(a.shape) > 1, len(b.shape) > 1
    outer = len(fact.shape) - row - column

    def term(o: Sequence[Index], k: Sequence[Index]) -> Expr:
        left, right = [*o[: outer + row], *k], [*o[:outer], *k, *o[outer + row :]]
        return call("mul", a.at(left), b.at(right))

    return lowering.reduce("sum", fact.shape, a.shape[-1:], fact.dtype, term)


@gpu_lowers(aten.baddbmm.default, aten.addmm.default)
def baddbmm(
    lowering: GpuLowering, fact: Fact, shift: Lazy, a: Lazy, b: Lazy, *, beta: float = 1, alpha: float = 1
) -> Lazy:
    y = product_of_activations(lowering, fact, a, b)
    return pointwise(fact, lambda s, p: call("add", scaled(s, float(beta)), scaled(p, float(alpha))), shift, y)
