"""Linear layers, rotations and products of activations on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from sylvester.codegen import gpu_hadamard
from sylvester.codegen.combined import summed
from sylvester.codegen.elementwise import call, pointwise, scaled
from sylvester.codegen.gpu_kernel import ALL_REDUCE
from sylvester.codegen.gpu_lowering import Candidate, Given, GpuLowering, gpu_lowers, over, stored
from sylvester.codegen.gpu_matmul import MOST_ROWS, Linear
from sylvester.codegen.gpu_steps import product_step
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.lazy import Buffer, Lazy, Pointer, Store, of_buffer
from sylvester.codegen.linears import row_pointer
from sylvester.codegen.lowering import Fact
from sylvester.codegen.scalar import Expr, cast
from sylvester.codegen.sparse import padded
from sylvester.codegen.sparse_layers import by_columns
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.quantized_ops import group_size

aten, dialect = torch.ops.aten, torch.ops.sylvester
SKIPS = f"sparse_linear, sparse_glu: up to {MOST_ROWS} rows leave out weights that meet zeros, more are dense products"
DENSE = "{}: dense products for any number of rows"


@gpu_lowers(aten.linear.default)
def linear(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None) -> Lazy:
    """Sums of generated loops for a weight that is a vector, a bias that broadcasts, an open number of features and
    what is not float32."""
    matrix = len(weight.shape) == 2 and all(n.constant is not None for n in weight.shape)
    whole = bias is None or bias.shape == weight.shape[:1]
    if not matrix or not whole or x.dtype != "f32":
        return _sums(lowering, fact, x, weight, bias)
    turned = by_columns(lowering, weight) is not None
    form = Linear("fp32", "fp32", "fp32", bias="fp32" if bias else "", turned=turned)
    return _product(lowering, fact, form, x, weight, bias)


def _sums(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None) -> Lazy:
    turned = Lazy(weight.shape[::-1], weight.dtype, lambda i: weight.load(i[::-1]))
    y = product_of_activations(lowering, fact, x, turned)
    return y if bias is None else pointwise(fact, lambda p, b: call("add", p, b), y, bias)


@gpu_lowers(dialect.combine.default)
def combine(
    lowering: GpuLowering, fact: Fact, atoms: Lazy, coefficients: Lazy, left: Lazy | None = None,
    right: Lazy | None = None, resident: bool = False,
) -> Lazy:  # fmt: skip
    """Made at every call: the sum of atoms by loops, to which a product adds what is of low rank."""
    total = lowering.realize(summed(lowering, fact, atoms, coefficients))
    if left is None or right is None:
        return total
    thin = linear(lowering, fact, left, Lazy(right.shape[::-1], right.dtype, lambda i: right.load(i[::-1])))
    return lowering.realize(pointwise(fact, lambda a, b: call("add", a, b), thin, total))


@gpu_lowers(dialect.sparse_linear.default)
def sparse_linear(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None) -> Lazy:
    skips = by_columns(lowering, weight) is not None and not lowering.steady
    lowering.notes[SKIPS if skips else DENSE.format("sparse_linear")] = None
    return linear(lowering, fact, x, weight, bias)


@gpu_lowers(dialect.sparse_glu.default)
def sparse_glu(
    lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None, gate: Lazy, thresholds: Lazy,
    activation: Literal["silu", "gelu", "gelu_tanh"],
) -> Lazy:  # fmt: skip
    lowering.notes[DENSE.format("sparse_glu") if lowering.steady else SKIPS] = None
    form = Linear("fp32", "fp32", "fp32", bias="fp32" if bias else "", opening=activation)
    others = {"gate": stored(lowering, gate), "thresholds": stored(lowering, thresholds)}
    return _product(lowering, fact, form, x, weight, bias, others)


@gpu_lowers(dialect.linear_bf16.default, dialect.linear_fp16.default)
def linear_short(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None) -> Lazy:
    kind = "bf16" if weight.dtype == "bf16" else "fp16"
    return _product(lowering, fact, Linear("fp32", kind, "fp32", bias="fp32" if bias else ""), x, weight, bias)


@gpu_lowers(dialect.linear_fp8.default)
def linear_fp8(
    lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, scales: Lazy, bias: Lazy | None = None
) -> Lazy:
    form = Linear("fp32", "fp8e4nv", "fp32", rounding="rows", bias="fp32" if bias else "")
    return _product(lowering, fact, form, x, weight, bias, {"scales": stored(lowering, scales)})


@gpu_lowers(dialect.widen_bf16.default, dialect.widen_fp16.default)
def widen_short(lowering: GpuLowering, fact: Fact, weight: Lazy) -> Lazy:
    return Lazy(fact.shape, "f32", lambda i: cast(weight.load(i), "f32"))


@gpu_lowers(dialect.dequantize_fp8.default)
def dequantize_fp8(lowering: GpuLowering, fact: Fact, weight: Lazy, scales: Lazy) -> Lazy:
    return Lazy(
        fact.shape, "f32", lambda i: call("mul", cast(weight.load(i), "f32"), scales.load([i[0], index(0)]))
    )  # fmt: skip


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
    n, k = static(fact.shape[-1]), static(x.shape[-1])
    rows, stride = row_pointer(lowering, x)
    y = lowering.buffer("arena", fact.shape, "f32")
    turned = by_columns(lowering, weight) if form.turned else None
    w, w_row = (stored(lowering, weight), weight.shape[1]) if turned is None else (_start(turned), index(padded(n)))
    pointers = {"x": rows, "w": w, "y": _start(y), **(others or {})}
    pointers |= {"bias": stored(lowering, bias)} if bias else {}
    step = product_step(form, pointers, product(x.shape[:-1]), n, k, stride, w_row)
    lowering.plan.steps.append(step)
    return of_buffer(y)


def _start(buffer: Buffer) -> Pointer:
    return Pointer(buffer.name, index(0))


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
    options = gpu_hadamard.candidates(rotation)
    lowering.tuned(options, lambda made: Candidate(made, grid), arguments, writes=(y.name,))
    return of_buffer(y)


@gpu_lowers(dialect.all_reduce.default)
def all_reduce(lowering: GpuLowering, fact: Fact, x: Lazy) -> Lazy:
    """Of a copy, which the host has summed in place."""
    total = lowering.buffer("arena", fact.shape, "f32")
    lowering.plan.steps.append(Store(total.name, fact.shape, "f32", x.load, total.offset))
    given: dict[str, Given] = {"y": Pointer(total.name, index(0)), "n": product(fact.shape)}
    lowering.launch(ALL_REDUCE, (index(1),), given, writes=(total.name,), changes=True)
    return of_buffer(total)


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
