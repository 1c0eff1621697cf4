"""Whole tensors in 8 or 4 bits with one scale: s = max|x| / top, q = round(x / s) (HALO, Ashkboos et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import LIBRARY, NAMESPACE

TINY = 2.0**-100
"""Scales below it count as 0, so that 1 / scale stays finite; a scale of 0 makes every value 0."""


class Rounded(NamedTuple):
    """values * scale is the tensor; the scale is float32 of no dimension."""

    values: Tensor
    scale: Tensor

    def wide(self) -> Tensor:
        """The tensor in float32, or float64 where the values are."""
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        return self.values.to(dtype) * self.scale


@dataclass(frozen=True)
class Format:
    """What values are stored as; the largest is `top`. Exact values are those of the tensor itself."""

    name: str
    dtype: torch.dtype | None
    top: float
    whole: bool

    @property
    def exact(self) -> bool:
        return self.dtype is None


FORMATS = {
    f.name: f
    for f in (
        Format("int8", torch.int8, 127.0, True),
        Format("fp8", torch.float8_e4m3fn, 448.0, False),
        Format("int4", torch.int8, 7.0, True),
        Format("exact", None, 1.0, False),
    )
}
"""int4 is stored and multiplied as int8; "exact" rounds nothing and shows that rotations cancel."""


def format_of(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}, expected one of {tuple(FORMATS)}")
    return FORMATS[name]


def scale_of(x: Tensor, format: str, what: str = "") -> Tensor:
    """max|x| / top as float32 of no dimension; on CPUs a `CompileError` names `what` when it is not finite.

    The scale of a tensor in parts is the maximum of theirs.
    """
    chosen = format_of(format)
    if chosen.exact:
        return torch.ones((), device=x.device)
    top = x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
    require_finite(top, what)
    return top / chosen.top


def require_finite(top: Tensor, what: str) -> None:
    """On GPUs nothing waits for the value: a NaN goes on through the scale."""
    if top.device.type == "cpu" and not math.isfinite(float(top.detach())):
        raise CompileError(
            f"{what or 'a tensor'} holds a NaN or an infinity, which cannot be rounded",
            hint="training has diverged: lower the learning rate, clip gradients, or look for where it comes from",
        )


def _quantised(x: Tensor, scale: Tensor | None, format: str, what: str) -> tuple[Tensor, Tensor]:
    chosen = format_of(format)
    scale = scale_of(x, format, what) if scale is None else scale.clone()
    if chosen.dtype is None:
        return x.clone(), scale
    inverse = torch.where(scale < TINY, 0.0, 1.0 / scale)
    steps = (x.float() * inverse).clamp(-chosen.top, chosen.top)
    return (steps.round() if chosen.whole else steps).to(chosen.dtype), scale


def _quantised_fact(x: Tensor, scale: Tensor | None, format: str, what: str) -> tuple[Tensor, Tensor]:
    dtype = format_of(format).dtype or x.dtype
    return torch.empty_like(x, dtype=dtype), x.new_empty((), dtype=torch.float32)


LIBRARY.define("halo_quantise(Tensor x, Tensor? scale, str format, str what) -> (Tensor, Tensor)")
LIBRARY.impl("halo_quantise", _quantised, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::halo_quantise", _quantised_fact, lib=LIBRARY)


def quantise(x: Tensor, format: str, scale: Tensor | None = None, what: str = "") -> Rounded:
    """x in a format, with its own scale or a given one; beyond top * scale values are cut."""
    op = cast(Callable[..., Any], torch.ops.sylvester.halo_quantise.default)
    return Rounded(*op(x, scale, format, what))
