"""Attention as one call and written out, with the masks, scales and head layouts that models use."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.raise_attention import RaiseAttention
from tests.programs import ops, reasons
from tests.programs import program as export

RAISE = Pipeline((Canonicalize(), RaiseAttention(), Canonicalize()))
Q, K, V = (torch.randn(3, 4, 6, 8) for _ in range(3))


def program(function: Callable[..., Tensor] | nn.Module, *args: Tensor) -> Program:
    """Batch and lengths are symbolic, heads and features are not."""
    return export(function, *args, axes=lambda x: [i for i, n in enumerate(x.shape) if n in (3, 6)])


def scores(q: Tensor, k: Tensor, scale: float = 0.25) -> Tensor:
    return q @ k.transpose(-2, -1) * scale


def lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def attention(after: Program) -> torch.fx.Node:
    (node,) = after.main.calls(torch.ops.sylvester.attention.default)
    return node


def flags(after: Program) -> tuple[object, ...]:
    """(has a mask, scale, causal, window), and the soft-cap where there is one."""
    _, _, _, mask, past, *others = attention(after).args
    assert past is None
    return mask is not None, *others


def agrees(after: Program, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """In float64, at a length and batch other than the example's."""
    result = after.run("forward", {f"x{i}": x for i, x in enumerate(inputs)})["y0"]
    wide = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    torch.testing.assert_close(result.double(), wide, rtol=1e-5, atol=1e-5)


def others(batch: int = 5, length: int = 11) -> list[Tensor]:
    return [torch.randn(batch, 4, length, 8) for _ in range(3)]


SCALED = {
    "scores": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "divided": lambda q, k, v: (q @ k.mT / 4.0).softmax(-1) @ v,
    "query": lambda q, k, v: ((q * 0.25) @ k.transpose(2, 3)).softmax(-1) @ v,
    "both": lambda q, k, v: ((q * 0.5) @ (k * 0.5).transpose(2, 3)).softmax(-1) @ v,
    "float32": lambda q, k, v: scores(q, k).softmax(-1, dtype=torch.float32).to(q.dtype) @ v,
    "dropout": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.1, False) @ v,
    "call": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
}


@pytest.mark.parametrize("name", SCALED)
def test_scales(name: str) -> None:
    after = RAISE(program(SCALED[name], Q, K, V))

    assert ops(after) == ["sylvester.attention"]
    assert flags(after) == (False, 0.25, False, 0)
    agrees(after, lambda q, k, v: scores(q, k).softmax(-1) @ v, *others())


def test_the_default_scale() -> None:
    after = RAISE(program(F.scaled_dot_product_attention, Q, K, V))

    assert flags(after) == (False, 8**-0.5, False, 0)


def by_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~lower(q.shape[2]), -math.inf).softmax(-1) @ v


def by_finite_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2]).triu(1) > 0
    return scores(q, k).masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1) @ v


def by_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)
    return (scores(q, k) + mask[None, None]).softmax(-1) @ v


def by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(lower(q.shape[2]), scores(q, k), -math.inf).softmax(-1) @ v


def by_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, (i[None, :] <= i[:, None]).expand(q.shape[0], 1, -1, -1), scale=0.25)


def by_flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)


@pytest.mark.parametrize("function", [by_fill, by_finite_fill, by_sum, by_where, by_positions, by_flag])
def test_causal_masks_become_the_flag(function: Callable[..., Tensor]) -> None:
    after = RAISE(program(function, Q, K, V))

    assert ops(after) == ["sylvester.attention"]
    assert flags(after) == (False, 0.25, True, 0)
    agrees(after, by_fill, *others())
    agrees(after, by_fill, *others(1, 1))


def windowed(window: int) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        seen = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)
        return F.scaled_dot_product_attention(q, k, v, seen, scale=0.25)

    return function


@pytest.mark.parametrize("window", [3, 8, 100, 4096])
def test_a_window_beyond_the_example_length_is_seen(window: int) -> None:
    after = RAISE(program(windowed(window), Q, K, V))

    assert flags(after) == (False, 0.25, True, window)
    agrees(after, windowed(window), *others())


def test_a_window_beyond_the_maximum_length_is_causal() -> None:
    built = program(windowed(100), Q, K, V)
    built.info["max_length"] = 50

    assert flags(RAISE(built)) == (False, 0.25, True, 0)


def test_a_window_too_large_to_evaluate_stays_a_mask() -> None:
    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(windowed(100_000), Q, K, V))

    assert flags(after) == (True, 0.25, True, 0)
    assert reasons(ledger) == ["the mask must be evaluated at length 100064, the limit is 8192"]


def test_a_mask_that_hides_nothing_goes() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, (i[None, :] >= 0).expand(q.shape[2], -1), scale=0.25)

    assert flags(RAISE(program(function, Q, K, V))) == (False, 0.25, False, 0)


def test_positions_in_another_pattern_stay_a_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, (i[None, :] - i[:, None]) % 2 == 0, scale=0.25)

    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(function, Q, K, V))

    assert flags(after) == (True, 0.25, False, 0)
    assert reasons(ledger) == ["the mask is no band of positions"]
    agrees(after, function, *others())


def test_a_mask_aligned_to_the_last_key_is_not_causal() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, j <= i + (k.shape[2] - q.shape[2]), scale=0.25)

    keys = [torch.randn(3, 4, 9, 8) for _ in range(2)]
    built = export(function, Q, *keys, axes=lambda x: (0, 2))

    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(built)

    assert flags(after) == (True, 0.25, False, 0)
    assert reasons(ledger) == ["the mask is no band of positions"]


def test_a_mask_for_all_queries_is_not_causal() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first_only = torch.arange(k.shape[2])[None, :] < 1
        return F.scaled_dot_product_attention(q, k, v, first_only, scale=0.25)

    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(function, Q, K, V))

    assert flags(after) == (True, 0.25, False, 0)
    assert reasons(ledger) == ["the mask is the same for all queries or all keys"]


def test_content_and_causal_masks_together() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        future = torch.full((q.shape[2], q.shape[2]), -math.inf).triu(1)
        return (scores(q, k) + future + padding[:, None, None, :]).softmax(-1) @ v

    def padding(batch: int, length: int) -> Tensor:
        return torch.zeros(batch, length).masked_fill(torch.arange(length) == length - 1, -1e30)

    built = program(function, Q, K, V, padding(3, 6))
    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(built)

    assert flags(after) == (True, 0.25, True, 0)
    assert reasons(ledger) == ["the mask depends on the input x3"]
    agrees(after, function, *others(), padding(5, 11))


def test_a_mask_added_before_the_scale_is_scaled() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1) + bias) * 0.25).softmax(-1) @ v

    after = RAISE(program(function, Q, K, V, torch.randn(3, 4, 6, 6)))

    assert flags(after) == (True, 0.25, False, 0)
    agrees(after, function, *others(), torch.randn(5, 4, 11, 11))


def test_a_bool_and_an_additive_mask_together() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        return (scores(q, k) + bias).masked_fill(~seen, -math.inf).softmax(-1) @ v

    built = program(function, Q, K, V, torch.rand(3, 1, 6, 6) > -1, torch.randn(1, 4, 6, 6))

    after = RAISE(built)

    assert flags(after) == (True, 0.25, False, 0)
    agrees(after, function, *others(), lower(11).expand(5, 1, 11, 11), torch.randn(1, 4, 11, 11))


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, features = x.shape
    wide = x[:, :, None, :, :].expand(batch, heads, groups, length, features)
    return wide.reshape(batch, heads * groups, length, features)


GROUPED = {
    "expand": lambda q, k, v: scores(q, repeat_kv(k, 2)).softmax(-1) @ repeat_kv(v, 2),
    "interleave": lambda q, k, v: scores(q, k.repeat_interleave(2, 1)).softmax(-1) @ v.repeat_interleave(2, dim=1),
    "call": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True),
    "call-expand": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), scale=0.25),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads_are_not_repeated(name: str) -> None:
    after = RAISE(program(GROUPED[name], Q, K[:, :2], V[:, :2]))
    q, k, v = others()

    assert ops(after) == ["sylvester.attention"]
    assert attention(after).args[1].op == "placeholder"
    agrees(after, GROUPED["expand"], q, k[:, :2], v[:, :2])


def test_tiled_heads_keep_their_repetition() -> None:
    def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k.repeat(1, 2, 1, 1)).softmax(-1) @ v.repeat(1, 2, 1, 1)

    after = RAISE(program(tiled, Q, K[:, :2], V[:, :2]))
    q, k, v = others()

    assert attention(after).args[1].op == "call_function"
    agrees(after, tiled, q, k[:, :2], v[:, :2])


def test_keys_that_are_stored_transposed() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.permute(0, 2, 3, 1) * 0.25).softmax(-1) @ v

    after = RAISE(program(function, Q, K.transpose(1, 2).contiguous(), V))
    q, k, v = others()

    assert ops(after) == ["aten.permute", "sylvester.attention"]
    agrees(after, function, q, k.transpose(1, 2), v)


def test_three_axes_get_one_head() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.25).softmax(-1), v)

    after = RAISE(program(function, Q[:, 0], K[:, 0], V[:, 0]))

    assert flags(after) == (False, 0.25, False, 0)
    agrees(after, function, *(x[:, 0] for x in others()))


def test_torch_multi_head_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(12, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    after = RAISE(program(Model(), torch.randn(3, 6, 12)))

    assert "sylvester.attention" in ops(after)
    assert "aten.scaled_dot_product_attention" not in ops(after)


def test_visible_weights_are_refused() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, weights

    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(function, Q, K, V))

    assert "sylvester.attention" not in ops(after)
    assert reasons(ledger) == ["the attention weights have 2 uses, expected one"]


def test_active_dropout_is_refused() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    pipeline = Pipeline((Canonicalize(), RaiseAttention()), check=False)
    after, ledger = pipeline.run(program(function, Q, K, V))

    assert "sylvester.attention" not in ops(after)
    assert reasons(ledger) == ["dropout of 0.5 is active"]


def test_a_softmax_over_queries_is_refused() -> None:
    pipeline = Pipeline((Canonicalize(), RaiseAttention()))
    after, ledger = pipeline.run(program(lambda q, k, v: scores(q, k).softmax(-2) @ v, Q, K, V))

    assert "sylvester.attention" not in ops(after)
    assert reasons(ledger) == ["the softmax is not over the keys"]


def test_a_mild_fill_is_refused() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(~lower(q.shape[2]), -5.0).softmax(-1) @ v

    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(function, Q, K, V))

    assert "sylvester.attention" not in ops(after)
    assert reasons(ledger) == ["hidden scores become -5.0, expected minus infinity"]


def test_other_softmaxes_are_left_in_silence() -> None:
    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(lambda x: x.softmax(-1) * 2, Q))

    assert ops(after) == ["aten.softmax.int", "aten.mul.Tensor"]
    assert reasons(ledger) == []


def blocks(i: Tensor, j: Tensor, w: Tensor) -> Tensor:
    return (i // 16 - j // 16) < 16


def float_window(i: Tensor, j: Tensor, w: Tensor) -> Tensor:
    return (i - j).float() < 100.0


def window_in_a_weight(i: Tensor, j: Tensor, w: Tensor) -> Tensor:
    return (i - j) < w


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (blocks, (True, 0.25, True, 0)),
        (float_window, (False, 0.25, True, 100)),
        (window_in_a_weight, (False, 0.25, True, 100)),
    ],
)
def test_a_limit_far_beyond_the_example_shows(seen: Callable[..., Tensor], expected: tuple[object, ...]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
        mask = (j <= i) & seen(i, j, w)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.25)

    w = torch.tensor(100)
    after = RAISE(export(function, Q, K, V, weights={"w": w}, axes=lambda x: (0, 2)))

    assert flags(after) == expected
    agrees(after, lambda q, k, v: function(q, k, v, w), *others(1, 300))


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_sum_that_adds_no_mask_as_it_is_is_refused(alpha: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        added = k[..., 0].unsqueeze(-2) if alpha == 2 else torch.arange(q.shape[2])[:, None] > 2
        return torch.add(scores(q, k), added, alpha=alpha).softmax(-1) @ v

    after, ledger = Pipeline((Canonicalize(), RaiseAttention())).run(program(function, Q, K, V))

    assert "sylvester.attention" not in ops(after)
    assert reasons(ledger) == ["the scores are summed with booleans or with alpha"]
    agrees(after, function, *others())
