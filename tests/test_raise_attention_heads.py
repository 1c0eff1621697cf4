"""Heads merged with the batch get their axis back; heads repeated for groups of queries are taken once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.programs import ops
from tests.programs import program as export
from tests.test_raise_attention import RAISE, K, Q, V, agrees, attention, flags, others, program, scores
from tests.test_raise_attention_forms import SLOPES, eager_alibi, keys_only, shape_of

dialect = torch.ops.sylvester


def merged(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def bloom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads are one axis, the bias is added by the product."""
    batch, heads, n, _ = q.shape
    alibi = (SLOPES * torch.arange(n)).repeat(batch, 1, 1)
    found = alibi.baddbmm(merged(q), merged(k).mT, beta=1.0, alpha=0.25).view(batch, heads, n, n)
    hidden = torch.full((n, n), torch.finfo(q.dtype).min).triu(1)
    weights = (found + hidden).softmax(-1).view(batch * heads, n, n)
    return torch.bmm(weights, merged(v)).view(batch, heads, n, -1)


def test_merged_heads_get_their_axis_back() -> None:
    after = RAISE(program(bloom, Q, K, V))

    assert flags(after) == (True, 0.25, True, 0)
    assert attention(after).args[0].op == "placeholder"
    assert shape_of(attention(after).args[3])[1:3] == ["4", "1"]
    agrees(after, eager_alibi(keys_only), *others())


def test_heads_that_are_merged_throughout() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        found = torch.bmm(merged(q), merged(k).mT) * 0.25 + merged(bias)
        return torch.bmm(found.softmax(-1), merged(v)).reshape(q.shape)

    after = RAISE(program(function, Q, K, V, torch.randn(3, 4, 6, 6)))

    assert "sylvester.attention" in ops(after)
    assert [n.op for n in attention(after).args[:4]] == ["placeholder"] * 4
    agrees(after, lambda q, k, v, b: (scores(q, k) + b).softmax(-1) @ v, *others(), torch.randn(5, 4, 11, 11))


def grouped_by_view(x: Tensor) -> Tensor:
    batch, n, heads, d = x.shape
    return x[:, :, :, None].expand(batch, n, heads, 2, d).reshape(batch, n, heads * 2, d)


def grouped_in_place(x: Tensor) -> Tensor:
    """One head of three in a group is taken for all."""
    batch, n, heads, d = x.shape
    return x.reshape(batch, n, heads // 2, 2, d)[:, :, :, 1:].expand(-1, -1, -1, 2, -1).flatten(2, 3)


SPEEDS = torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)


def turned(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[2])[:, None] * SPEEDS
    return dialect.rope(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), False)


BEHIND_TOKENS = {
    "view": (grouped_by_view, 2),
    "interleave": (lambda x: x.repeat_interleave(2, 2), 2),
    "slice": (grouped_in_place, 4),
}


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("name", BEHIND_TOKENS)
def test_heads_repeated_behind_the_tokens(name: str, rotated: bool) -> None:
    repeat, heads = BEHIND_TOKENS[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (repeat(x).transpose(1, 2) for x in (k, v))
        return scores(q, turned(k) if rotated else k).softmax(-1) @ v

    def behind(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [q, *(x[:, :heads].transpose(1, 2).contiguous() for x in (k, v))]

    after = RAISE(export(function, *behind(Q, K, V), axes=lambda x: [i for i, n in enumerate(x.shape) if n in (3, 6)]))

    assert shape_of(attention(after).args[1])[1] == "2"
    assert not after.main.calls(torch.ops.aten.expand.default, torch.ops.aten.repeat_interleave.self_int)
    agrees(after, function, *behind(*others()))
