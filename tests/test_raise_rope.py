"""Rotary positions in the layouts of GPT-NeoX, Llama, GPT-J and hand-written models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sylvester.compiler.pipeline import Pipeline
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.raise_rope import RaiseRope
from tests.programs import ops, program, reasons

RAISE = Pipeline((Canonicalize(), RaiseRope()))


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)


def embedded(rotate: Callable[[Tensor], Tensor], axis: int = 1) -> Callable[..., Tensor]:
    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        return (x * cos) + (rotate(x) * sin)

    return apply


def split_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def split_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


X = torch.randn(2, 3, 5, 8)
WIDE, NARROW = torch.randn(2, 5, 8), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("function", "table", "interleaved"),
    [
        (embedded(rotate_half), WIDE, False),
        (embedded(rotate_chunks), WIDE, False),
        (embedded(rotate_pairs), WIDE, True),
        (split_pairs, NARROW, True),
        (split_halves, NARROW, False),
    ],
)
def test_becomes_one_rope(function: Callable[..., Tensor], table: Tensor, interleaved: bool) -> None:
    built = program(function, X, table, table + 1)

    after = RAISE(built)

    (node,) = after.main.calls(torch.ops.sylvester.rope.default)
    assert node.args[3] is interleaved
    assert "aten.neg" not in ops(after)
    assert not {"aten.unsqueeze", "aten.squeeze.dim"} & set(ops(after)) or table is NARROW


def test_partial_rotation() -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turning, passing = x[..., :4], x[..., 4:]
        return torch.cat((embedded(rotate_half)(turning, cos, sin), passing), -1)

    after = RAISE(program(partial, X, WIDE[..., :4], WIDE[..., 4:]))
    (node,) = after.main.calls()

    assert node.target is torch.ops.sylvester.rope.default


def test_partial_rotation_inside_a_fused_projection() -> None:
    def fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = x.chunk(2, -1)
        turned = [torch.cat((embedded(rotate_half)(p[..., :4], cos, sin), p[..., 4:]), -1) for p in (q, k)]
        return turned[0] @ turned[1].transpose(-2, -1)

    after, ledger = RAISE.run(program(fused, torch.randn(2, 3, 5, 16), WIDE[..., :4], WIDE[..., 4:]))

    assert ops(after).count("sylvester.rope") == 2
    assert ledger.rows[-1].changes.counts()["RopePart"] == 2


def test_tokens_before_heads_are_refused() -> None:
    built = program(embedded(rotate_half, axis=2), torch.randn(2, 5, 3, 8), WIDE, WIDE + 1)

    after, ledger = RAISE.run(built)

    assert "sylvester.rope" not in ops(after)
    assert "expected [batch, 1, tokens, 8]" in reasons(ledger)[0]


def test_a_cut_off_the_middle_is_refused() -> None:
    def skewed(x: Tensor) -> Tensor:
        return torch.cat((-x[..., 3:], x[..., :3]), -1)

    after, ledger = RAISE.run(program(embedded(skewed), X, WIDE, WIDE + 1))

    assert "sylvester.rope" not in ops(after)
    assert reasons(ledger) == ["rotates at 3, expected half of 8 features"]


def test_another_length_agrees_with_float64() -> None:
    after = RAISE(program(embedded(rotate_half), X, WIDE, WIDE + 1))
    x, cos, sin = torch.randn(1, 3, 9, 8), torch.randn(1, 9, 8), torch.randn(1, 9, 8)

    result = after.run("forward", {"x0": x, "x1": cos, "x2": sin})["y0"]

    expected = embedded(rotate_half)(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
