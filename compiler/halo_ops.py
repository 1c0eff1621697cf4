"""Linear layers that train in 8 bits: rotated, rounded products in forward and backward (HALO, Ashkboos et al., 2025).

F: Y = X W^T. E: the gradient of X = E W, with E that of Y. G: the gradient of W = E^T X. R turns features, H tokens.
What is kept for the gradients is rounded: X R, or H X R, and W R.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sylvester.compiler.halo_kernels import has_tiles, library_for, multiplier_for
from sylvester.compiler.halo_quantise import Rounded, format_of, quantise, require_finite
from sylvester.compiler.halo_rotate import restore_tokens, rotate, rotate_tokens
from sylvester.compiler.ops import FACTS, LIBRARY, NAMESPACE

EXACT_SUM = 1 << 24
"""Whole numbers up to it are exact in float32."""
LARGEST_PRODUCT = 127 * 127


@dataclass(frozen=True)
class Turns:
    """Rotations of one product A B: left of A and right of B, undone on the result, or between them, where they cancel.

    F has features in the middle and E and G have them right; E has tokens left and G has them in the middle.
    """

    left: bool = False
    right: bool = False
    middle: bool = False


@dataclass(frozen=True)
class Level:
    """What is rotated in each product. Features are rotated in all of them or in none, tokens of G only as in E."""

    forward: Turns
    error: Turns
    gradient: Turns


LEVELS = (
    Level(Turns(), Turns(), Turns()),
    Level(Turns(middle=True), Turns(right=True), Turns(right=True)),
    Level(Turns(middle=True), Turns(left=True, right=True), Turns(right=True)),
    Level(Turns(middle=True), Turns(left=True, right=True), Turns(right=True, middle=True)),
)


def level_of(level: int) -> Level:
    if isinstance(level, bool) or level not in range(len(LEVELS)):
        raise ValueError(f"level is {level!r}, expected one of {tuple(range(len(LEVELS)))}")
    return LEVELS[level]


def _mm(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """scale * (a b) of a [m, k] and b [k, n], with exact sums of whole numbers; float32, or float64 where a is."""
    if (kernels := multiplier_for(a, b)) and (found := kernels.product(a, b, scale)) is not None:
        return cast(Tensor, found)
    if a.dtype == torch.int8 and a.device.type == "cpu" and has_tiles():
        return torch._int_mm(a, b).float() * scale
    if a.dtype == torch.int8:
        wide = torch.float32 if a.shape[1] * LARGEST_PRODUCT < EXACT_SUM else torch.float64
    else:
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    product = (a.to(wide) @ b.to(wide)) * scale
    return product if a.dtype == torch.float64 else product.float()


def _mm_fact(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


LIBRARY.define("halo_mm(Tensor a, Tensor b, Tensor scale) -> Tensor")
LIBRARY.impl("halo_mm", _mm, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::halo_mm", _mm_fact, lib=LIBRARY)


def composite_rounded(x: Tensor, scale: Tensor | None, format: str, features: bool, tokens: bool, what: str) -> Rounded:
    """Q(x), Q(x R), Q(H x) or Q(H x R) of x [rows, features], rotated in float32 or wider."""
    y = x if x.dtype == torch.float64 or format_of(format).exact else x.float()
    y = rotate(y) if features else y
    y = rotate_tokens(y) if tokens else y
    return quantise(y, format, scale, what)


def composite_product(
    a: Rounded, b: Rounded, bias: Tensor | None, features: bool, tokens: int, dtype: torch.dtype
) -> Tensor:
    """a b, without the rotation of its features, or with only the first `tokens` rows and without theirs; plus bias."""
    y = cast(Tensor, torch.ops.sylvester.halo_mm.default(a.values, b.values, a.scale * b.scale))
    y = rotate(y, transposed=True) if features else y
    y = restore_tokens(y, tokens) if tokens else y
    return (y if bias is None else y + bias).to(dtype)


def rounded(
    x: Tensor, format: str, features: bool = False, tokens: bool = False, scale: Tensor | None = None, what: str = ""
) -> Rounded:
    """Q(x R) with `features`, Q(H x) with `tokens` of x [rows, features]; Q has its own scale or a given one."""
    if kernels := library_for(x, scale):
        found = kernels.rounded(x, scale, format, features, tokens)
        if found is not None:
            require_finite(found[1], what)
            return Rounded(*found)
    return composite_rounded(x, scale, format, features, tokens, what)


def rounded_weight(weight: Tensor, level: int, format: str, scale: Tensor | None = None, name: str = "") -> Rounded:
    """Q(W R) of [out, in] as a level multiplies with it; rows may be rounded apart when they get one scale."""
    return rounded(weight, format, level_of(level).forward.middle, scale=scale, what=f"the weight of {_layer(name)}")


def product(
    a: Rounded, b: Rounded, dtype: torch.dtype, turns: Turns, tokens: int = 0, bias: Tensor | None = None
) -> Tensor:
    """a b in `dtype`, of which what was turned left or right is undone, then plus bias."""
    kept = tokens if turns.left else 0
    if kernels := library_for(*a, *b, bias):
        found = kernels.product(a.values, b.values, a.scale * b.scale, bias, turns.right, kept, dtype)
        if found is not None:
            return cast(Tensor, found)
    return composite_product(a, b, bias, turns.right, kept, dtype)


def _transposed(x: Rounded) -> Rounded:
    return Rounded(x.values.t(), x.scale)


def _layer(name: str) -> str:
    return f"the layer {name!r}" if name else "a layer"


class Halo(torch.autograd.Function):
    """Y = X W^T + b of x [..., in]; W is given rounded, or else it is rounded here. Saves 8-bit tensors only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor | None,
        scale: Tensor | None,
        level: int,
        format: str,
        name: str,
        given: Rounded | None,
    ) -> Tensor:
        if values is not None and scale is not None:
            w = Rounded(values, scale)
        else:
            w = rounded_weight(cast(Tensor, weight), level, format, name=name)
        if x.shape[-1] != w.values.shape[1]:
            raise ValueError(f"{_layer(name)} takes {w.values.shape[1]} features, got an input of {list(x.shape)}")
        turns, what, rows = level_of(level), f"the input of {_layer(name)}", x.reshape(-1, x.shape[-1])
        kept = turned = given or rounded(rows, format, turns.forward.middle, what=what)
        y = product(turned, _transposed(w), x.dtype, turns.forward, bias=bias)
        if turns.gradient.middle and ctx.needs_input_grad[1]:
            kept = rounded(rows, format, turns.gradient.right, tokens=True, what=what)
        ctx.save_for_backward(*(kept if ctx.needs_input_grad[1] else (None, None)), *w)
        ctx.turns, ctx.format, ctx.name, ctx.shape = turns, format, name, x.shape
        ctx.dtypes = x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype
        return y.reshape(*x.shape[:-1], w.values.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        turns: Level = ctx.turns
        x_values, x_scale, w_values, w_scale = ctx.saved_tensors
        rows = given.reshape(-1, given.shape[-1])
        what = f"the gradient of the output of {_layer(ctx.name)}"
        error = dx = dw = None
        if ctx.needs_input_grad[0]:
            error = rounded(rows, ctx.format, tokens=turns.error.left, what=what)
            dx = product(error, Rounded(w_values, w_scale), ctx.dtypes[0], turns.error, rows.shape[0])
            dx = dx.reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            if error is None or turns.error.left != turns.gradient.middle:
                error = rounded(rows, ctx.format, tokens=turns.gradient.middle, what=what)
            dw = product(_transposed(error), Rounded(x_values, x_scale), ctx.dtypes[1], turns.gradient)
        db = rows.sum(0, dtype=_sum_type(rows)).to(ctx.dtypes[2]) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None, None, None, None


_halo = cast(Callable[..., Tensor], Halo.apply)


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def halo_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    level: int,
    format: str,
    name: str = "",
    values: Tensor | None = None,
    scale: Tensor | None = None,
    x_values: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> Tensor:
    """x W^T + bias as HALO-`level` trains it in a format; `name` is that of the layer in errors.

    `values` and `scale` are those of `rounded_weight(weight)` where it was rounded before; the gradient still goes to
    `weight`, which is not read then. `x_values` and `x_scale` are those of x [rows, in] where another layer of the
    same level and format has rounded it.
    """
    given = None if x_values is None or x_scale is None else Rounded(x_values, x_scale)
    return _halo(x, weight, bias, values, scale, level, format, name, given)


def halo_product(x: Tensor, weight: Rounded, bias: Tensor | None, level: int, format: str, name: str = "") -> Tensor:
    """x W^T + bias of a frozen weight from `rounded_weight`, without its gradient: nothing of x is kept."""
    return _halo(x, None, bias, weight.values, weight.scale, level, format, name, None)


def _halo_fact(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LIBRARY.define(
    "halo_linear(Tensor x, Tensor weight, Tensor? bias, int level, str format, str name='', Tensor? values=None, "
    "Tensor? scale=None, Tensor? x_values=None, Tensor? x_scale=None) -> Tensor"
)
LIBRARY.impl("halo_linear", halo_linear, "CompositeImplicitAutograd")
HALO_LINEAR = cast(Callable[..., Tensor], torch.ops.sylvester.halo_linear.default)
FACTS[HALO_LINEAR] = _halo_fact
