"""Norms, softmax and rotary positions as launches on a GPU, where rows fit and memory is as their kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx

from sylvester.codegen import aten_norms, gpu_norms
from sylvester.codegen import dialect as loops
from sylvester.codegen.families import collapsed, unit_last
from sylvester.codegen.gpu_lowering import Given, GpuLowering, gpu_lowers, over, stored
from sylvester.codegen.gpu_matmul import Norm
from sylvester.codegen.gpu_steps import norm_step
from sylvester.codegen.index import index, product
from sylvester.codegen.lazy import Lazy, Pointer, as_strided, of_buffer
from sylvester.codegen.linears import row_pointer
from sylvester.codegen.lowering import Fact
from sylvester.compiler.parts import ATTENTIONS
from sylvester.compiler.program import value

aten, dialect = torch.ops.aten, torch.ops.sylvester
UPDATES = (dialect.kv_update.default, dialect.kv_update_q.default)


@gpu_lowers(dialect.rms_norm.default)
def rms_norm(lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy | None, eps: float) -> Lazy:
    made = _norm(lowering, fact, "rms", x, weight, None, eps)
    return made or aten_norms.rms_norm(lowering, fact, x, weight, eps)


@gpu_lowers(aten.rms_norm.default)
def aten_rms_norm(
    lowering: GpuLowering,
    fact: Fact,
    x: Lazy,
    sizes: Sequence[Any],
    weight: Lazy | None = None,
    eps: float | None = None,
) -> Lazy:
    found = aten_norms.FLOAT_EPS if eps is None else eps
    made = _norm(lowering, fact, "rms", x, weight, None, found) if len(sizes) == 1 else None
    return made or aten_norms.aten_rms_norm(lowering, fact, x, sizes, weight, eps)


@gpu_lowers(aten.layer_norm.default)
def layer_norm(
    lowering: GpuLowering,
    fact: Fact,
    x: Lazy,
    sizes: Sequence[Any],
    weight: Lazy | None = None,
    bias: Lazy | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Lazy:
    made = _norm(lowering, fact, "layer", x, weight, bias, eps) if len(sizes) == 1 else None
    return made or aten_norms.layer_norm(lowering, fact, x, sizes, weight, bias, eps)


def _norm(
    lowering: GpuLowering,
    fact: Fact,
    kind: Literal["rms", "layer"],
    x: Lazy,
    weight: Lazy | None,
    bias: Lazy | None,
    eps: float,
) -> Lazy | None:
    """A step that products may take in, or None where its rows do not fit, or a view has no one distance of rows."""
    n, parameters = x.shape[-1].constant, {"norm_weight": weight, "norm_bias": bias}
    given = {name: p for name, p in parameters.items() if p is not None}
    if n is None or n > gpu_norms.WIDEST or not _by_rows(x):
        return None
    if any(p.dtype != "f32" or p.shape != (index(n),) for p in given.values()):
        return None
    rows, stride = row_pointer(lowering, x)
    y = lowering.buffer("arena", fact.shape, "f32")
    pointers = {"x": rows, "y": Pointer(y.name, index(0)), **{name: stored(lowering, p) for name, p in given.items()}}
    norm = Norm(kind, eps, "fp32" if weight else "", "fp32" if bias else "")
    lowering.plan.steps.append(norm_step(norm, pointers, product(x.shape[:-1]), n, stride))
    return of_buffer(y)


def _by_rows(x: Lazy) -> bool:
    """Whether x is float32, and computed, or a view of rows of neighbours at one distance: else it would be copied."""
    view = as_strided(x)
    rows = view is None or (view.strides[-1] == index(1) and collapsed(view.strides[:-1], x.shape[:-1]) is not None)
    return x.dtype == "f32" and rows


@gpu_lowers(aten.softmax.int, aten._softmax.default)
def softmax(lowering: GpuLowering, fact: Fact, x: Lazy, dim: int, *_: Any) -> Lazy:
    n, rank = x.shape[-1].constant if x.shape else None, len(x.shape)
    computed = as_strided(x) is None or lowering.whole(x) is not None
    if n is None or dim % rank != rank - 1 or x.dtype != "f32" or not computed:
        return aten_norms.softmax(lowering, fact, x, dim)
    y, m = lowering.buffer("arena", fact.shape, "f32"), product(x.shape[:-1])
    places = {"y": Pointer(y.name, index(0)), "x": stored(lowering, x)}
    grid = m if n > gpu_norms.WIDEST else over(m, gpu_norms.rows_of(n))
    made = gpu_norms.softmax(n, "f32", "f32")
    lowering.launch(made, (grid,), {**places, "rows": m, "n": index(n)}, writes=(y.name,))
    return of_buffer(y)


@gpu_lowers(dialect.rope.default)
def rope(lowering: GpuLowering, fact: Fact, x: Lazy, cos: Lazy, sin: Lazy, interleaved: bool) -> Lazy:
    """A kernel where all that reads the result needs it in memory; elementwise readers turn it as they read."""
    batch, heads, rows, d = fact.shape
    rotary, plain = cos.shape[-1].constant, all(lowering.whole(table) for table in (cos, sin))
    alike = sin.shape == cos.shape and cos.shape[-2] == rows and x.dtype == cos.dtype == sin.dtype == "f32"
    if rotary is None or d.constant is None or not (plain and alike and _all_in_memory(lowering.node)):
        return loops.rope(lowering, fact, x, cos, sin, interleaved)
    view, y = unit_last(lowering, x), lowering.buffer("arena", fact.shape, "f32")
    shared = len(cos.shape) < 3 or cos.shape[0] == index(1)
    given: dict[str, Given] = {
        "y": Pointer(y.name, index(0)), "x": Pointer(view.buffer, view.offset), "cos": stored(lowering, cos),
        "sin": stored(lowering, sin), "total": batch * heads * rows, "heads": heads, "rows": rows,
        "y_batch": heads * rows * d, "y_head": rows * d, "y_row": d, "angle_row": cos.shape[-1],
        "angle_batch": index(0) if shared else rows * cos.shape[-1],
        **{f"x_{part}": stride for part, stride in zip(("batch", "head", "row"), view.strides, strict=False)},
    }  # fmt: skip
    made = gpu_norms.rope(d.constant, rotary, "f32", "f32", "f32", interleaved=interleaved)
    lowering.launch(made, (over(batch * heads * rows, gpu_norms.ROPE_ROWS),), given, writes=(y.name,))
    return of_buffer(y)


def _all_in_memory(node: fx.Node | None) -> bool:
    """Whether only attention and caches that are no float32 read the result of a node."""
    return node is not None and all(
        user.target in ATTENTIONS or (user.target in UPDATES and value(user).dtype != torch.float32)
        for user in node.users
    )
