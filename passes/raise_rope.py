"""x * cos + rotate_half(x) * sin -> rope(x, cos, sin), also on a part of the features and on neighbouring pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sylvester.compiler import ops
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.rewrite import Match, Refusal, Rule, either, optional, rewrite

HEADS = -3
CASTS = (torch.ops.aten.to.dtype, torch.ops.aten.type_as.default)


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    return either(x[..., :half], first), either(x[..., half:], second)


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """Interleave the last axes of x and y."""
    stacked = either(torch.cat((x.unsqueeze(-1), y.unsqueeze(-1)), -1), torch.stack((x, y), -1))
    return stacked.flatten(-2)


def table(angles: Tensor) -> Tensor:
    """A cos or sin table without its broadcast axis for heads."""
    return angles.squeeze(HEADS) if angles.dim() == 4 else angles


def features(x: Tensor, start: int, end: int) -> Tensor:
    """x itself when the part is all of it."""
    return x if start == 0 and end >= x.shape[-1] else x[..., start:end]


def in_the_middle(match: Match) -> Refusal | None:
    """A refusal unless the halves are cut in the middle of x; chunks always are."""
    features = match.fact("x").shape[-1]
    if match["half"] in (None, features // 2):
        return None
    return Refusal(f"rotates at {match['half']}, expected half of {features} features", match.root)


def fits(match: Match, width: int) -> Refusal | None:
    """A refusal unless x is [batch, heads, tokens, features] and the tables, `width` wide, broadcast over heads."""
    if match.fact("x").dim() != 4:
        return Refusal(f"x has {match.fact('x').dim()} axes, expected batch, heads, tokens, features", match.root)
    for name in ("cos", "sin"):
        shape = match.fact(name).shape
        if shape[-1] != width or len(shape) < 2 or (len(shape) > 2 and shape[HEADS] != 1):
            return Refusal(f"{name} is {list(shape)}, expected [batch, 1, tokens, {width}]", match[name])
    return None


class RopeHalves(Rule):
    """Hugging Face: pairs (i, i + half), tables as wide as x."""

    example = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8), 4)
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        first, second = halves(x, half)
        return x * cos + torch.cat((-second, first), -1) * sin

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor, half: int | None) -> Tensor:
        return ops.rope(x, table(cos), table(sin), False)

    def allow(self, match: Match) -> Refusal | None:
        return in_the_middle(match) or fits(match, match.fact("x").shape[-1])


class RopeSplitHalves(Rule):
    """Pairs (i, i + half) turned one by one, tables half as wide as x."""

    example = ((2, 3, 5, 8), (5, 4), (5, 4), 4)
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        first, second = halves(x, half)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor, half: int | None) -> Tensor:
        cos, sin = table(cos), table(sin)
        return ops.rope(x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), False)

    def allow(self, match: Match) -> Refusal | None:
        return in_the_middle(match) or fits(match, match.fact("x").shape[-1] // 2)


class RopePairs(Rule):
    """GPT-J: pairs (2i, 2i + 1), tables as wide as x."""

    example = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8))
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + pairs(-x[..., 1::2], x[..., ::2]) * sin

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.rope(x, table(cos), table(sin), True)

    def allow(self, match: Match) -> Refusal | None:
        return fits(match, match.fact("x").shape[-1])


class RopeSplitPairs(Rule):
    """Pairs (2i, 2i + 1) turned one by one, tables half as wide as x."""

    example = ((2, 3, 5, 8), (5, 4), (5, 4))
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return pairs(even * cos - odd * sin, even * sin + odd * cos)

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = table(cos), table(sin)
        return ops.rope(x, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), True)

    def allow(self, match: Match) -> Refusal | None:
        return fits(match, match.fact("x").shape[-1] // 2)


class RopePart(Rule):
    """Features [start, end) of a wider tensor, of which those up to `rotary` turn (GPT-NeoX, Phi)."""

    example = ((2, 3, 5, 14), (2, 1, 5, 6), (2, 1, 5, 6), 2, 5, 8, 11)
    transparent = CASTS

    @staticmethod
    def before(x: Tensor, cos: Tensor, sin: Tensor, start: int, half: int, rotary: int, end: int) -> Tensor:
        turned = torch.cat((-x[..., half:rotary], x[..., start:half]), -1)
        y = x[..., start:rotary] * cos + turned * sin
        return optional(torch.cat((y, x[..., rotary:end]), -1), y)

    @staticmethod
    def after(x: Tensor, cos: Tensor, sin: Tensor, start: int, half: int, rotary: int, end: int | None) -> Tensor:
        return ops.rope(features(x, start, rotary if end is None else end), table(cos), table(sin), False)

    def allow(self, match: Match) -> Refusal | None:
        start, half, rotary = match["start"], match["half"], match["rotary"]
        if half - start != rotary - half:
            return Refusal(f"rotates features {start} to {rotary} at {half}, expected their middle", match.root)
        return fits(match, rotary - start)


class HeadAxis(Rule):
    """A broadcast axis that is added and removed again."""

    example = ((2, 5, 8),)
    free = True

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return x.unsqueeze(HEADS).squeeze(HEADS)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class RaiseRope(Pass):
    """Rotary position embeddings become single ops over un-broadcast tables."""

    name: ClassVar[str] = "raise-rope"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        rules = (RopeHalves(), RopeSplitHalves(), RopePairs(), RopeSplitPairs(), RopePart(), HeadAxis())
        return rewrite(program, rules)
