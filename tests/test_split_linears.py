"""A layer whose result is only taken apart becomes one layer per part."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import fx

from sylvester.compiler.ledger import Row
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.split_linears import SplitLinears
from tests.graphs import GELU, LINEAR, PERMUTE, RESHAPE, Builder, aten


def split(program: Program) -> tuple[Program, Row]:
    done, ledger = Pipeline((SplitLinears(),)).run(program)
    assert ledger.rows[0].error is not None
    assert ledger.rows[0].error < 1e-6
    return done, ledger.rows[0]


def sliced(b: Builder, x: fx.Node, *bounds: int, dim: int = -1) -> list[fx.Node]:
    pairs = itertools.pairwise(bounds)
    return [b.call(GELU, b.call(aten.slice.Tensor, x, dim, low, high)) for low, high in pairs]


def test_slices_of_the_features_become_layers_of_those_rows() -> None:
    b = Builder()
    program = b.returns(*sliced(b, b.linear(b.input(2, 5, 8), "up", 12, bias=True), 0, 4, 12))

    done, row = split(program)

    assert row.changes.counts() == {"split": 1}
    assert set(done.weights) == {"up.part.weight", "up.part.bias", "up.part.weight.2", "up.part.bias.2"}
    assert torch.equal(done.weights["up.part.weight.2"], program.weights["up.weight"][4:])
    assert done.main.calls(aten.slice.Tensor) == []


def selected(b: Builder, y: fx.Node) -> list[fx.Node]:
    """[batch, tokens, 3, heads, d] -> three of [batch, heads, tokens, d]."""
    parts = b.call(PERMUTE, b.call(RESHAPE, y, [2, 5, 3, 2, 4]), [2, 0, 3, 1, 4])
    return [b.call(GELU, b.call(aten.select.int, parts, 0, k)) for k in (0, 1, -1)]


def interleaved(b: Builder, y: fx.Node) -> list[fx.Node]:
    """Queries, keys and values of one head side by side, as GPT-NeoX stores them."""
    return sliced(b, b.call(PERMUTE, b.call(RESHAPE, y, [2, 5, 2, 12]), [0, 2, 1, 3]), 0, 4, 8, 12)


def unordered(b: Builder, y: fx.Node) -> list[fx.Node]:
    parts = b.call(RESHAPE, y, [-1, 3, 8])
    return [b.call(GELU, b.call(aten.select.int, parts, 1, k)) for k in range(3)]


def merged_tokens(b: Builder, y: fx.Node) -> list[fx.Node]:
    return sliced(b, b.call(RESHAPE, y, [10, 2, 3, 4]), 0, 1, 4)


def overlapping(b: Builder, y: fx.Node) -> list[fx.Node]:
    return [*sliced(b, y, 0, 16), *sliced(b, y, 8, 2**63 - 1), *sliced(b, y, -4, 24)]


@pytest.mark.parametrize("take", [selected, interleaved, unordered, merged_tokens, overlapping])
@pytest.mark.parametrize("bias", [False, True])
def test_views_and_orders(take: Callable[[Builder, fx.Node], list[fx.Node]], bias: bool) -> None:
    b = Builder()
    parts = take(b, b.linear(b.input(2, 5, 8), "qkv", 24, bias=bias))

    done, row = split(b.returns(*parts))

    assert row.changes.counts() == {"split": 1}
    assert len(done.main.calls(LINEAR)) == len(parts)
    assert all(tensor.shape[0] < 24 for tensor in done.weights.values())


def whole_too(b: Builder, y: fx.Node) -> list[fx.Node]:
    return [*sliced(b, y, 0, 12, 24), y]


def tokens(b: Builder, y: fx.Node) -> list[fx.Node]:
    return sliced(b, y, 0, 2, 5, dim=1)


def steps(b: Builder, y: fx.Node) -> list[fx.Node]:
    return [b.call(GELU, b.call(aten.slice.Tensor, y, 2, k, 24, 2)) for k in (0, 1)]


def one_part(b: Builder, y: fx.Node) -> list[fx.Node]:
    return sliced(b, y, 0, 12)


def inner_axis(b: Builder, y: fx.Node) -> list[fx.Node]:
    return sliced(b, b.call(RESHAPE, y, [2, 5, 4, 6]), 0, 2, 4, dim=2)


def mixed_tokens(b: Builder, y: fx.Node) -> list[fx.Node]:
    return sliced(b, b.call(RESHAPE, y, [2, 15, 8]), 0, 4, 8)


@pytest.mark.parametrize("take", [whole_too, tokens, steps, one_part, inner_axis])
def test_what_is_left_alone(take: Callable[[Builder, fx.Node], list[fx.Node]]) -> None:
    b = Builder()

    done, row = split(b.returns(*take(b, b.linear(b.input(2, 5, 8), "qkv", 24, bias=True))))

    assert row.changes.applied == []
    assert set(done.weights) == {"qkv.weight", "qkv.bias"}


def test_features_that_become_tokens_are_not_split() -> None:
    b = Builder()

    done, _ = split(b.returns(*mixed_tokens(b, b.linear(b.input(2, 5, 8), "qkv", 24))))

    assert set(done.weights) == {"qkv.weight"}


def test_a_weight_that_is_also_read_whole_is_refused() -> None:
    b = Builder()
    x = b.input(2, 5, 8)

    _, row = split(b.returns(*sliced(b, b.linear(x, "up", 12), 0, 4, 12), b.linear(x, "up", 12)))

    assert [refused.reason for refused in row.changes.refused] == ["the weight is also read whole"]


def test_computed_weights_are_no_layers_of_ours() -> None:
    b = Builder()
    weight = b.call(aten.neg.default, b.weight("w", 12, 8))

    _, row = split(b.returns(*sliced(b, b.call(LINEAR, b.input(2, 8), weight), 0, 4, 12)))

    assert row.changes.applied == row.changes.refused == []


def test_entries_share_the_parts() -> None:
    b = Builder("prefill")
    b.returns(*sliced(b, b.linear(b.input(2, 5, 8), "up", 12), 0, 4, 12))
    c = Builder("decode", b.program)

    done, _ = split(c.returns(*sliced(c, c.linear(c.input(2, 1, 8), "up", 12), 0, 4, 12)))

    assert set(done.weights) == {"up.part.weight", "up.part.weight.2"}


def test_a_second_run_finds_nothing() -> None:
    b = Builder()
    program = b.returns(*sliced(b, b.linear(b.input(2, 5, 8), "up", 12), 0, 4, 12))

    _, ledger = Pipeline((SplitLinears(), SplitLinears())).run(program)

    assert [len(row.changes.applied) for row in ledger.rows] == [1, 0]
