"""Soft-caps, biases of positions, merged heads and cross-attention, written out and as one call."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import binding
from sylvester.compiler.trace import capture
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.fold_constants import FoldConstants
from sylvester.passes.raise_attention import RaiseAttention
from sylvester.passes.raise_norms import RaiseNorms
from tests.programs import Wrapped, ops, reasons
from tests.programs import program as export
from tests.test_raise_attention import RAISE, K, Q, V, agrees, attention, flags, lower, others, program, scores

ONE_PASS = Pipeline((Canonicalize(), RaiseAttention()))


def shape_of(node: torch.fx.Node) -> list[str]:
    return [str(n) for n in node.meta["val"].shape]


def capped(x: Tensor, cap: float = 5.0) -> Tensor:
    return cap * torch.tanh(x / cap)


SOFT_CAPS = {
    "gemma": lambda q, k, v: capped(scores(q, k)).softmax(-1) @ v,
    "factors": lambda q, k, v: (torch.tanh(scores(q, k) * 0.2) * 5).softmax(-1) @ v,
    "query": lambda q, k, v: capped((q * 0.25) @ k.mT).softmax(-1) @ v,
    "negative": lambda q, k, v: (torch.tanh(scores(q, k) * -0.2) * -5).softmax(-1) @ v,
    "float32": lambda q, k, v: capped(scores(q, k)).softmax(-1, dtype=torch.float32).to(q.dtype) @ v,
}


@pytest.mark.parametrize("name", SOFT_CAPS)
def test_soft_caps(name: str) -> None:
    after = RAISE(program(SOFT_CAPS[name], Q, K, V))

    assert ops(after) == ["sylvester.attention"]
    assert flags(after) == (False, pytest.approx(0.25), False, 0, 5.0)
    agrees(after, SOFT_CAPS["gemma"], *others())


def test_a_soft_cap_with_masks_and_grouped_heads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 4)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (capped(scores(q, k)) + bias).masked_fill(~seen, -math.inf).softmax(-1) @ v

    after = RAISE(program(function, Q, K[:, :2], V[:, :2], torch.randn(1, 4, 6, 6)))
    q, k, v = others()

    assert flags(after) == (True, 0.25, True, 4, 5.0)
    agrees(after, function, q, k[:, :2], v[:, :2], torch.randn(1, 4, 11, 11))


def test_a_scale_after_the_soft_cap_is_a_part_of_it() -> None:
    after = RAISE(program(lambda q, k, v: (capped(scores(q, k)) * 3).softmax(-1) @ v, Q, K, V))

    assert flags(after) == (False, pytest.approx(0.75), False, 0, 15.0)
    agrees(after, lambda q, k, v: (capped(scores(q, k)) * 3).softmax(-1) @ v, *others())


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


def keys_only(n: int) -> Tensor:
    return SLOPES * torch.arange(n)


def distance(n: int) -> Tensor:
    i = torch.arange(n)
    return SLOPES * (i[None] - i[:, None])


def from_the_end(n: int) -> Tensor:
    return SLOPES * torch.arange(1 - n, 1)


def eager_alibi(bias: Callable[[int], Tensor]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (scores(q, k) + bias(n)).masked_fill(~lower(n), -math.inf).softmax(-1) @ v

    return function


def sdpa_alibi(bias: Callable[[int], Tensor]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        mask = bias(n).expand(4, n, n).masked_fill(~lower(n), torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.25)

    return function


def summed_alibi(bias: Callable[[int], Tensor]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        mask = bias(n) + torch.full((n, n), -math.inf).triu(1)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.25)

    return function


@pytest.mark.parametrize("bias", [keys_only, distance, from_the_end])
@pytest.mark.parametrize("form", [eager_alibi, sdpa_alibi, summed_alibi])
def test_alibi_is_a_mask_beside_the_causal_flag(
    form: Callable[[Callable[[int], Tensor]], Callable[..., Tensor]], bias: Callable[[int], Tensor]
) -> None:
    after, ledger = ONE_PASS.run(program(form(bias), Q, K, V))

    assert flags(after) == (True, 0.25, True, 0)
    assert reasons(ledger) == ["the mask differs between batch rows or heads"]
    agrees(after, form(keys_only), *others())


def buckets(n: int, m: int) -> Tensor:
    """Distances of T5: exact up to 8, then in logarithmic steps."""
    far = torch.arange(m)[None] - torch.arange(n)[:, None]
    near = far.abs()
    wide = 8 + (torch.log(near.clamp(min=1) / 8) / math.log(16) * 8).long()
    return (far > 0) * 16 + torch.where(near < 8, near, wide.clamp(8, 15))


def relative(table: Tensor, n: int) -> Tensor:
    return table[buckets(n, n)].permute(2, 0, 1)[None]


def t5_eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (q @ k.mT + relative(table, q.shape[2])).softmax(-1) @ v


def t5_sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, relative(table, q.shape[2]), scale=1.0)


@pytest.mark.parametrize("function", [t5_eager, t5_sdpa])
def test_relative_biases_stay_a_mask(function: Callable[..., Tensor]) -> None:
    table = torch.randn(32, 4)
    after = RAISE(export(function, Q, K, V, weights={"table": table}, axes=lambda x: (0, 2)))

    assert flags(after) == (True, 1.0, False, 0)
    agrees(after, lambda q, k, v: t5_eager(q, k, v, table.to(q.dtype)), *others())


CROSS = {
    "eager": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25),
}


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention(name: str) -> None:
    built = export(CROSS[name], Q, *(torch.randn(3, 4, 9, 8) for _ in range(2)), axes=lambda x: (0, 2))
    after = RAISE(built)

    assert flags(after) == (False, 0.25, False, 0)
    agrees(after, CROSS["eager"], torch.randn(5, 4, 3, 8), *(torch.randn(5, 4, 13, 8) for _ in range(2)))


def test_normed_queries_and_keys() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w for x in (q, k))
        return scores(q, k).softmax(-1) @ v

    w = torch.rand(8) + 0.5
    built = export(function, Q, K, V, weights={"w": w}, axes=lambda x: (0, 2))
    after = Pipeline((Canonicalize(), RaiseNorms(), RaiseAttention(), Canonicalize()))(built)

    assert ops(after) == ["sylvester.rms_norm", "sylvester.rms_norm", "sylvester.attention"]
    agrees(after, lambda q, k, v: function(q, k, v, w.to(q.dtype)), *others())


def test_a_learned_temperature_scales_the_queries() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q @ k.mT * t).masked_fill(~lower(q.shape[2]), -math.inf).softmax(-1) @ v

    t = torch.rand(4, 1, 1) + 0.5
    after = RAISE(export(function, Q, K, V, weights={"t": t}, axes=lambda x: (0, 2)))

    assert flags(after) == (False, 1.0, True, 0)
    agrees(after, lambda q, k, v: function(q, k, v, t.to(q.dtype)), *others())


def test_a_subtracted_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return (scores(q, k) - hidden * 1e4).softmax(-1) @ v

    hidden = (torch.rand(3, 1, 6, 6) > 0.5).float()
    after = RAISE(program(function, Q, K, V, hidden))

    assert flags(after) == (True, 0.25, False, 0)
    agrees(after, function, *others(), (torch.rand(5, 1, 11, 11) > 0.5).float())


@pytest.mark.parametrize("top", [lambda x: x.amax(-1, keepdim=True), lambda x: x.max(-1, keepdim=True).values])
def test_the_largest_score_of_a_query_may_be_subtracted(top: Callable[[Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) - top(scores(q, k))).softmax(-1) @ v

    after = RAISE(program(function, Q, K, V))

    assert ops(after) == ["sylvester.attention"]
    agrees(after, function, *others())


def test_a_softmax_written_with_exponentials() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = scores(q, k).masked_fill(~lower(q.shape[2]), torch.finfo(q.dtype).min)
        weights = torch.exp(found - found.max(-1, keepdim=True).values)
        return (weights / weights.sum(-1, keepdim=True)) @ v

    after = RAISE(program(function, Q, K, V))

    assert ops(after) == ["sylvester.attention"]
    assert flags(after) == (False, 0.25, True, 0)
    agrees(after, function, *others())


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)


DECOMPOSED = {
    "soft-cap": (SOFT_CAPS["gemma"], (False, 0.25, False, 0, 5.0)),
    "alibi": (eager_alibi(keys_only), (True, 0.25, True, 0)),
    "cross": (CROSS["eager"], (False, 0.25, False, 0)),
    "sdpa": (CROSS["sdpa"], (False, 0.25, False, 0)),
    "grouped": (grouped_sdpa, (False, 0.25, True, 0)),
    "alibi sdpa": (sdpa_alibi(keys_only), (True, 0.25, True, 0)),
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("name", DECOMPOSED)
def test_programs_in_core_aten(name: str, symbolic: bool) -> None:
    function, expected = DECOMPOSED[name]
    dims = {i: Dim.AUTO for i in (0, 2)} if symbolic else {}
    exported = torch.export.export(Wrapped(function, {}), (Q, K, V), dynamic_shapes=((dims,) * 3,), strict=False)

    after = RAISE(capture(exported.run_decompositions()))

    assert flags(after) == tuple(pytest.approx(x) if isinstance(x, float) else x for x in expected)
    assert shape_of(attention(after).args[1])[1] == ("2" if name == "grouped" else "4")
    given = others() if symbolic else [Q, K, V]
    keys = [binding(n).key for n in after.main.placeholders("input")]
    (found,) = after.run("forward", dict(zip(keys, given, strict=True))).values()
    torch.testing.assert_close(found, function(*given), rtol=1e-5, atol=1e-5)


def test_a_fill_in_a_weight() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, least: Tensor) -> Tensor:
        return torch.where(lower(q.shape[2]), scores(q, k), least).softmax(-1) @ v

    least = torch.tensor(torch.finfo(torch.float32).min)
    built = export(function, Q, K, V, weights={"least": least}, axes=lambda x: (0, 2))
    after = Pipeline((Canonicalize(), FoldConstants(), RaiseAttention(), Canonicalize()))(built)

    assert flags(after) == (False, 0.25, True, 0)


def test_an_intersection_of_content_and_positions() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        seen = lower(q.shape[2]) & padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, seen, scale=0.25)

    def padding(batch: int, length: int) -> Tensor:
        return (torch.arange(length) < length - 2).expand(batch, -1).contiguous()

    after, ledger = ONE_PASS.run(program(function, Q, K, V, padding(3, 6)))

    assert flags(after) == (True, 0.25, True, 0)
    assert shape_of(attention(after).args[3])[1:3] == ["1", "1"]
    assert reasons(ledger) == ["the mask depends on the input x3"]
    agrees(after, function, *others(), padding(5, 11))


def sinks(x: Tensor) -> Tensor:
    return torch.cat((x, torch.zeros_like(x[..., :1])), -1)


REFUSED = {
    "clamp": (lambda q, k: scores(q, k).clamp(-2, 2), "the scores go through clamp, expected"),
    "relu": (lambda q, k: scores(q, k).relu() * 2, "the scores go through relu, expected"),
    "square": (lambda q, k: capped(scores(q, k)) ** 2, "the scores go through pow"),
    "sinks": (lambda q, k: sinks(scores(q, k)), "the scores go through cat, expected"),
    "two caps": (lambda q, k: capped(capped(scores(q, k)), 3.0), "a soft-cap is scaled by a tensor or lies under"),
    "masked cap": (lambda q, k: capped(scores(q, k) + q[..., :1]), "a mask lies under a soft-cap"),
    "per key": (lambda q, k: scores(q, k) * k[..., 0].unsqueeze(-2), "the scores are scaled by a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_explained(name: str) -> None:
    before, reason = REFUSED[name]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return before(q, k).softmax(-1)[..., : v.shape[2]] @ v

    after, ledger = ONE_PASS.run(program(function, Q, K, V))

    assert "sylvester.attention" not in ops(after)
    assert len(reasons(ledger)) == 1
    assert reason in reasons(ledger)[0]
    agrees(after, function, *others())


def test_a_softmax_away_from_products_is_left_in_silence() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w).softmax(-1), w) @ x.mT

    after, ledger = ONE_PASS.run(export(function, Q, weights={"w": torch.randn(8, 8)}, axes=lambda x: (0, 2)))

    assert "sylvester.attention" not in ops(after)
    assert reasons(ledger) == []
