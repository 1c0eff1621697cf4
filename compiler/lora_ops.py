"""A frozen linear layer, kept as its rounded values, with a trained one of low rank beside it (LoRA, Hu et al., 2021).

Y = X W^T + (X A^T) B^T f. The product with W and its gradient of X are those of HALO; A and B multiply in float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sylvester.compiler.halo_ops import halo_product, level_of, product, rounded
from sylvester.compiler.halo_quantise import Rounded
from sylvester.compiler.halo_rotate import rotate
from sylvester.compiler.ops import FACTS, LIBRARY


class Lora(torch.autograd.Function):
    """Of x [..., in], the rounded W [out, in], A [rank, in] and B [out, rank]; A may read other values than W does.

    What A reads is kept in 8 bits, and nothing for W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        w: Rounded,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        level: int,
        format: str,
        factor: float,
        name: str,
    ) -> Tensor:
        turns, what, rows = level_of(level), f"the input of the layer {name!r}", x.reshape(-1, x.shape[-1])
        kept = turned = rounded(rows, format, turns.forward.middle, what=what)
        y = product(turned, Rounded(w.values.t(), w.scale), x.dtype, turns.forward, bias=bias)
        trains = ctx.needs_input_grad[4]
        if other is not None:
            rows = other.reshape(-1, x.shape[-1])
            kept = rounded(rows, format, turns.forward.middle, what=what) if trains else turned
        low = rows.to(a.dtype) @ a.t()
        y = y + (low @ b.t()).to(y.dtype) * factor
        ctx.save_for_backward(*(kept if trains else (None, None)), *w, low, a, b)
        ctx.turns, ctx.format, ctx.factor, ctx.name = turns, format, factor, name
        ctx.shape, ctx.dtype, ctx.other = x.shape, x.dtype, other is not None
        return y.reshape(*x.shape[:-1], b.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        x_values, x_scale, w_values, w_scale, low, a, b = ctx.saved_tensors
        rows = given.reshape(-1, given.shape[-1])
        wide = rows.to(b.dtype) * ctx.factor
        small = wide @ b
        dx = dother = da = None
        if ctx.needs_input_grad[1]:
            dother = (small @ a).to(ctx.dtype).reshape(ctx.shape)
        if ctx.needs_input_grad[0]:
            what = f"the gradient of the output of the layer {ctx.name!r}"
            error = rounded(rows, ctx.format, tokens=ctx.turns.error.left, what=what)
            dx = product(error, Rounded(w_values, w_scale), ctx.dtype, ctx.turns.error, rows.shape[0])
            dx = (dx if ctx.other else dx + (small @ a).to(dx.dtype)).reshape(ctx.shape)
        if ctx.needs_input_grad[4]:
            da = (small.t() @ x_values.to(small.dtype)) * x_scale
            da = rotate(da, transposed=True) if ctx.turns.forward.middle else da
        db = wide.t() @ low if ctx.needs_input_grad[5] else None
        dbias = rows.sum(0, dtype=b.dtype) if ctx.needs_input_grad[3] else None
        return dx, dother, None, dbias, da, db, None, None, None, None


_lora = cast(Callable[..., Tensor], Lora.apply)


def halo_lora(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    level: int,
    format: str,
    factor: float,
    name: str,
    other: Tensor | None = None,
) -> Tensor:
    """x W^T + bias of a frozen W that `rounded_weight` has given; with A and B, (x A^T) B^T factor is added.

    `other` is what A reads instead of x.
    """
    if a is None or b is None:
        return halo_product(x, Rounded(values, scale), bias, level, format, name)
    return _lora(x, other, Rounded(values, scale), bias, a, b, level, format, factor, name)


def _fact(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


LIBRARY.define(
    "halo_lora(Tensor x, Tensor values, Tensor scale, Tensor? bias, Tensor? a, Tensor? b, int level, str format, "
    "float factor, str name, Tensor? other=None) -> Tensor"
)
LIBRARY.impl("halo_lora", halo_lora, "CompositeImplicitAutograd")
HALO_LORA = torch.ops.sylvester.halo_lora.default
FACTS[HALO_LORA] = _fact
