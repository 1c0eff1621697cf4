"""Products of two activations, which a kernel family computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from sylvester.codegen import matmul as matmul_family
from sylvester.codegen.elementwise import call, pointwise, scaled
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.lazy import Extern, Lazy, Pointer, Shape, Strided, as_strided, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers

aten = torch.ops.aten
MATMUL = "sv_matmul"


def collapsed(strides: Sequence[Index], shape: Shape) -> Index | None:
    """The stride of the axes flattened into one, or None when they do not flatten; unit axes do not matter."""
    axes = [(s, n) for s, n in zip(strides, shape, strict=True) if n.constant != 1]
    for (outer, _), (inner, n) in pairwise(axes):
        if outer != inner * n:
            return None
    return axes[-1][0] if axes else index(0)


@lowers(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(lowering: Lowering, fact: Fact, a: Lazy, b: Lazy) -> Lazy:
    """Batched product of two activations; operands are read through their strides."""
    left, right = _as_matrix(a, row=True), _as_matrix(b, row=False)
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    batch = fact.shape[: len(fact.shape) - (len(a.shape) > 1) - (len(b.shape) > 1)]
    (a_view, a_batch), (b_view, b_batch) = (_batched(lowering, x, batch) for x in (left, right))
    y = lowering.buffer("arena", fact.shape, fact.dtype)
    lowering.extern(
        Extern(
            MATMUL,
            matmul_family.matmul(MATMUL),
            (
                Pointer(y.name, index(0)),
                Pointer(a_view.buffer, a_view.offset),
                Pointer(b_view.buffer, b_view.offset),
                product(batch),
                m,
                n,
                k,
                a_batch,
                *a_view.strides[-2:],
                b_batch,
                *b_view.strides[-2:],
            ),
            writes=(y.name,),
            reads=(a_view.buffer, b_view.buffer),
            work=product(batch) * m * n * k,
            scratch=(f"{MATMUL}_scratch", (k,)),
        )
    )
    return of_buffer(y)


def _as_matrix(x: Lazy, *, row: bool) -> Lazy:
    if len(x.shape) > 1:
        return x
    shape = (index(1), x.shape[0]) if row else (x.shape[0], index(1))
    return Lazy(shape, x.dtype, lambda i: x.load([i[1] if row else i[0]]))


def _batched(lowering: Lowering, x: Lazy, batch: Shape) -> tuple[Strided, Index]:
    """A strided view of `x` broadcast to `batch`, and the stride of the batch axes flattened into one."""
    wide = Lazy((*batch, *x.shape[-2:]), x.dtype, x.at)
    for candidate in (wide, None):
        source = candidate or of_buffer(lowering.contiguous(wide))
        view = as_strided(source)
        stride = None if view is None else collapsed(view.strides[:-2], batch)
        if view is not None and stride is not None:
            return view, stride
    raise AssertionError("a contiguous buffer is always a view with collapsible batch axes")


@lowers(aten.baddbmm.default, aten.addmm.default)
def baddbmm(
    lowering: Lowering, fact: Fact, shift: Lazy, a: Lazy, b: Lazy, *, beta: float = 1, alpha: float = 1
) -> Lazy:
    y = matmul(lowering, fact, a, b)
    return pointwise(fact, lambda s, p: call("add", scaled(s, float(beta)), scaled(p, float(alpha))), shift, y)


def unit_last(lowering: Lowering, x: Lazy) -> Strided:
    """x as a strided view whose last axis is contiguous."""
    view = as_strided(x)
    if view is None or view.strides[-1] != index(1):
        view = as_strided(of_buffer(lowering.contiguous(x)))
    assert view is not None
    return view
