"""x rsqrt(mean(x^2) + eps) w -> rms_norm(x, w, eps);  (x - mean) / sqrt(var + eps) w + b -> layer_norm(x, w, b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler import ops
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.rewrite import Match, Refusal, Rule, either, optional, rewrite

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.type_as.default, aten._to_copy.default)


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def mean_square(x: Tensor) -> Tensor:
    return either(mean(x**2), mean(x * x))


def over_root(x: Tensor, y: Tensor) -> Tensor:
    """x / sqrt(y) as it is commonly written."""
    return either(x * torch.rsqrt(y), x / torch.sqrt(y), x * (1 / torch.sqrt(y)))


def per_feature(match: Match, *names: str) -> Refusal | None:
    """A refusal unless the operands hold one value for each feature of x."""
    features = match.fact("x").shape[-1]
    for name in names:
        if match[name] is not None and tuple(match.fact(name).shape) != (features,):
            found = list(match.fact(name).shape)
            return Refusal(f"{name} is {found}, expected one value for each of {features} features", match[name])
    return None


class RmsNorm(Rule):
    """Hugging Face, Gemma (weight 1 + w), T5 and hand-written forms, with casts around the float32 part."""

    example = ((2, 3, 8), (8,), 1e-6)
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = over_root(x, mean_square(x) + eps)
        return optional(y * weight, y)

    @staticmethod
    def after(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return ops.rms_norm(x, weight, eps)

    def allow(self, match: Match) -> Refusal | None:
        return per_feature(match, "weight")


class TorchRmsNorm(Rule):
    """torch.nn.RMSNorm; its default epsilon is the machine epsilon of the type."""

    example = ((2, 3, 8), (8,), 1e-6)

    @staticmethod
    def before(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        last = (x.shape[-1],)
        stated = optional(F.rms_norm(x, last, weight, eps), F.rms_norm(x, last, None, eps))
        return either(stated, optional(F.rms_norm(x, last, weight), F.rms_norm(x, last)))

    @staticmethod
    def after(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
        return ops.rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)

    def allow(self, match: Match) -> Refusal | None:
        return last_axis_only(match)


def last_axis_only(match: Match) -> Refusal | None:
    axes = match.root.args[1]
    if isinstance(axes, (list, tuple)) and len(axes) == 1:
        return None
    return Refusal(f"normalises over {axes}, expected the last axis only", match.root)


class LayerNorm(Rule):
    """Hand-written layer norm, with or without scale and shift."""

    example = ((2, 3, 8), (8,), (8,), 1e-5)
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        centred = x - mean(x)
        variance = either(
            mean_square(centred),
            x.var(-1, unbiased=False, keepdim=True),
            x.var(-1, correction=0, keepdim=True),
        )
        y = over_root(centred, variance + eps)
        scaled = optional(y * weight, y)
        return optional(scaled + bias, scaled)

    @staticmethod
    def after(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def allow(self, match: Match) -> Refusal | None:
        return per_feature(match, "weight", "bias")


@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Norms written out in arithmetic become single ops."""

    name: ClassVar[str] = "raise-norms"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        return rewrite(program, (LayerNorm(), RmsNorm(), TorchRmsNorm()))
