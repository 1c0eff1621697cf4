"""What each op does to the basis of features: which members share a space, and what pins it."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.space_rules import infer
from sylvester.compiler.spaces import Axis, Slot, Space
from sylvester.passes.rotate_hadamard import RotateHadamard
from tests.graphs import ADD, EMBEDDING, GELU, LINEAR, MUL, PERMUTE, RESHAPE, Builder, aten, dialect


def space_of(b: Builder, member: fx.Node | Axis | Slot, *results: fx.Node, **state: fx.Node) -> Space:
    """The space of a member, once the results are what the entry returns."""
    b.returns(*results, **state)
    found = [s for s in infer(b.program) if member in s.nodes or member in s.axes or member in s.slots]
    assert len(found) == 1
    return found[0]


def looked_up(b: Builder, width: int = 8, key: str = "table") -> fx.Node:
    return b.call(EMBEDDING, b.weight(key, 16, width), b.ids(2, 6, high=16))


def kinds(space: Space) -> set[tuple[str, str]]:
    return {(pin.kind, pin.node.name) for pin in space.pins}


def test_a_linear_layer_ties_its_weight_to_both_sides() -> None:
    b = Builder()
    x = looked_up(b)
    y = b.linear(x, "up", 12, bias=True)

    before, after = (space_of(b, n, b.call(GELU, y)) for n in (x, y))

    assert before.axes == [Axis("table", 1), Axis("up.weight", 1)]
    assert after.axes == [Axis("up.bias", 0), Axis("up.weight", 0)]
    assert before.reads == {x: [y]}
    assert kinds(before) == set()


def test_inputs_outputs_and_other_ops_pin() -> None:
    b = Builder()
    x = b.input(2, 8)
    y = b.linear(x, "up", 12)
    z = b.call(GELU, y)

    assert kinds(space_of(b, x, z)) == {("made", x.name)}
    assert kinds(space_of(b, y, z)) == {("read", y.name)}
    assert kinds(space_of(b, z, z)) == {("made", z.name), ("read", z.name)}
    assert space_of(b, z, z).made()[z].reason == "gelu does not commute with a rotation of its features"


@pytest.mark.parametrize(
    "keep",
    [
        lambda b, x: b.call(ADD, x, looked_up(b, key="other")),
        lambda b, x: b.call(ADD, x, b.weight("v", 8), alpha=0.5),
        lambda b, x: b.call(ADD, x, b.weight("positions", 6, 8)),
        lambda b, x: b.call(MUL, x, 3.0),
        lambda b, x: b.call(aten.div.Tensor, x, 3.0),
        lambda b, x: b.call(MUL, b.input(2, 6, 1), x),
        lambda b, x: b.call(MUL, x, b.weight("one", 1)),
        lambda b, x: b.call(MUL, x, b.weight("per token", 6, 1)),
        lambda b, x: b.call(aten.neg.default, x),
        lambda b, x: b.rms(x),
        lambda b, x: b.call(aten.mean.dim, x, [1]),
        lambda b, x: b.call(aten.sum.dim_IntList, x, [0], True),
        lambda b, x: b.call(aten.select.int, x, 1, -1),
        lambda b, x: b.call(aten.slice.Tensor, x, 1, 2, 5),
        lambda b, x: b.call(aten.cat.default, [x, x], 1),
        lambda b, x: b.call(PERMUTE, x, [1, 0, 2]),
        lambda b, x: b.call(aten.unsqueeze.default, x, -2),
        lambda b, x: b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, 0), [5, -1, -1, -1]),
        lambda b, x: b.call(RESHAPE, x, [12, 8]),
    ],
)
def test_what_keeps_a_basis(keep: object) -> None:
    b = Builder()
    x = looked_up(b)
    y = keep(b, x)  # type: ignore[operator]

    space = space_of(b, x, b.rms(y, "gain"))

    assert space.nodes[x] == space.nodes[y] == 1
    assert space.width == 8
    assert kinds(space) == {("read", y.name)}


@pytest.mark.parametrize(
    "breaks",
    [
        lambda b, x: b.call(ADD, x, 1.0),
        lambda b, x: b.call(ADD, x, b.weight("one", 1)),
        lambda b, x: b.call(ADD, x, b.weight("per token", 6, 1)),
        lambda b, x: b.call(MUL, x, b.weight("v", 8)),
        lambda b, x: b.call(MUL, x, x),
        lambda b, x: b.call(aten.div.Tensor, b.input(2, 6, 1), x),
        lambda b, x: b.call(aten.mean.dim, x, [-1], True),
        lambda b, x: b.call(aten.sum.dim_IntList, x, [], False),
        lambda b, x: b.call(aten.slice.Tensor, x, 2, 0, 4),
        lambda b, x: b.call(aten.select.int, x, 2, 0),
        lambda b, x: b.call(aten.cat.default, [x, x], 2),
        lambda b, x: b.call(RESHAPE, x, [2, 16, 3]),
        lambda b, x: b.rms(x, "gain"),
        lambda b, x: b.layer_norm(x, "norm"),
        lambda b, x: b.call(aten.masked_fill.Scalar, x, b.call(aten.gt.Scalar, b.input(2, 6, 1), 0.0), 0.0),
        lambda b, x: b.call(LINEAR, x, b.call(aten.neg.default, b.weight("computed", 8, 8))),
    ],
)
def test_what_breaks_a_basis(breaks: object) -> None:
    b = Builder()
    x = looked_up(b)
    y = breaks(b, x)  # type: ignore[operator]

    space = space_of(b, Axis("table", 1), b.call(aten.neg.default, y))

    assert y not in space.nodes
    if x in y.all_input_nodes:
        assert ("read", x.name) in kinds(space)


def test_the_width_is_what_all_reshapes_leave_together() -> None:
    b = Builder()
    x = looked_up(b, 24)
    thirds, pairs = b.call(RESHAPE, x, [2, 6, 3, 8]), b.call(RESHAPE, x, [2, 72, 2])

    space = space_of(b, x, thirds, pairs)

    assert (space.width, space.sizes) == (2, {24, 8, 2})


def test_reshaping_tokens_into_features_keeps_blocks() -> None:
    b = Builder()
    x = looked_up(b, 8)
    rows = b.call(RESHAPE, x, [2, 48])
    y = b.linear(rows, "flat", 4)

    space = space_of(b, x, b.call(GELU, y))

    assert (space.width, space.sizes) == (8, {8, 48})
    assert Axis("flat.weight", 1) in space.axes


def test_features_of_another_axis_are_followed_back() -> None:
    b = Builder()
    x = b.call(PERMUTE, looked_up(b), [0, 2, 1])
    y = b.call(PERMUTE, b.call(RESHAPE, b.call(MUL, x, 2.0), [2, 8, 3, 2]), [0, 2, 3, 1])

    space = space_of(b, y, b.rms(y, "gain"))

    assert (space.nodes[x], space.nodes[y]) == (2, 1)
    assert Axis("table", 1) in space.axes


def test_sums_of_values_with_features_elsewhere_are_pinned() -> None:
    b = Builder()
    x = looked_up(b, 6)
    total = b.call(ADD, x, b.call(PERMUTE, x, [0, 2, 1]))

    assert ("made", total.name) in kinds(space_of(b, total, total))


@pytest.mark.parametrize("batched", [True, False])
def test_a_convolution_writes_its_channels(batched: bool) -> None:
    b = Builder()
    x = b.input(*([2] * batched), 3, 8, 8)
    y = b.call(aten.conv2d.default, x, b.weight("conv", 12, 3, 3, 3), b.weight("bias", 12), [1, 1], [1, 1], [1, 1], 1)

    space = space_of(b, y, b.call(GELU, y))

    assert space.nodes[y] == 3
    assert space.width == 12
    assert set(space.axes) == {Axis("conv", 0), Axis("bias", 0)}


def test_a_grouped_convolution_is_plain() -> None:
    b = Builder()
    weight = b.weight("conv", 8, 1, 3)
    y = b.call(aten.conv1d.default, b.input(2, 8, 6), weight, None, [1], [1], [1], 8)

    assert kinds(space_of(b, Axis("conv", 0), y)) == {("stored", weight.name)}


def test_attention_ties_queries_to_keys_and_values_to_its_result() -> None:
    b = Builder()
    q, k, v = (b.heads(b.linear(looked_up(b, 24), part, 24), 3) for part in "qkv")
    out = b.joined(b.attention(q, k, v))
    y = b.linear(out, "o", 24)

    keys, values = (space_of(b, n, y) for n in (k, v))

    assert q in keys.nodes
    assert v not in keys.nodes
    assert out in values.nodes
    assert values.width == 8
    assert set(values.axes) == {Axis("v.weight", 0), Axis("o.weight", 1)}


def test_keys_that_are_values_share_one_space() -> None:
    b = Builder()
    q, k = (b.heads(b.linear(looked_up(b), part, 8), 2) for part in "qk")
    out = b.attention(q, k, k)

    assert {q, k, out} <= set(space_of(b, k, out).nodes)


def test_a_mask_with_features_is_read_plain() -> None:
    b = Builder()
    x = looked_up(b, 6)
    mask = b.call(aten.unsqueeze.default, x, 1)
    q, k, v = (b.heads(b.linear(looked_up(b), part, 8), 2) for part in "qkv")

    assert kinds(space_of(b, x, b.attention(q, k, v, mask))) == {("read", mask.name)}


def test_attention_that_takes_its_queries_as_mask_is_plain() -> None:
    b = Builder()
    q = b.call(RESHAPE, looked_up(b, 6), [2, 1, 6, 6])
    out = b.attention(q, b.call(aten.clone.default, q), b.call(MUL, q, 1.0), q)

    assert ("made", out.name) in kinds(space_of(b, out, out))


def test_state_slots_belong_to_the_space_of_their_content() -> None:
    b = Builder()
    new = b.heads(b.linear(looked_up(b), "k", 8), 2)
    cache = b.call(dialect.kv_update.default, b.state("cache", 2, 2, 16, 4), new, b.given(torch.tensor(3)))

    space = space_of(b, Slot("cache"), b.call(GELU, cache), cache=cache)

    assert {new, cache} <= set(space.nodes)
    assert kinds(space) == {("read", cache.name)}


def test_a_state_that_is_returned_as_well_stays_plain() -> None:
    b = Builder()
    new = b.heads(b.linear(looked_up(b), "k", 8), 2)
    cache = b.call(dialect.kv_update.default, b.state("cache", 2, 2, 16, 4), new, b.given(torch.tensor(3)))

    assert space_of(b, Slot("cache"), cache, cache=cache).stored()


def test_a_state_in_another_layout_stays_plain() -> None:
    b = Builder()
    turned = b.call(PERMUTE, looked_up(b), [0, 2, 1])

    assert space_of(b, Slot("cache"), turned, cache=turned).stored()


def test_one_weight_ties_all_that_read_it() -> None:
    b = Builder()
    x, y = looked_up(b), looked_up(b, key="other")
    results = b.linear(x, "shared", 12), b.linear(y, "shared", 12)

    assert space_of(b, x, *results) is not None
    assert y in space_of(b, x, *results).nodes
    assert set(space_of(b, x, *results).reads) == {x, y}


def test_a_shared_bias_ties_what_layers_write() -> None:
    b = Builder()
    x = looked_up(b)
    a, c = (b.call(LINEAR, x, b.weight(key, 12, 8), b.weight("bias", 12)) for key in "ac")

    assert c in space_of(b, a, b.call(GELU, a), b.call(GELU, c)).nodes


def test_a_bias_of_one_value_leaves_nothing_to_rotate() -> None:
    b = Builder()
    y = b.call(LINEAR, b.call(RESHAPE, looked_up(b), [12, 8]), b.weight("w", 12, 8), b.weight("bias", 1))

    assert space_of(b, y, b.linear(y, "next", 4)).width == 1


def test_a_square_weight_may_be_in_one_space_twice() -> None:
    b = Builder()
    x = looked_up(b)
    y = b.call(ADD, x, b.linear(x, "square", 8))

    assert {Axis("square.weight", 0), Axis("square.weight", 1)} <= set(space_of(b, y, y).axes)


def test_rows_of_a_table_are_never_rotated() -> None:
    b = Builder()
    x = looked_up(b)
    scores = b.call(LINEAR, x, b.weight("table", 16, 8))
    y = b.linear(scores, "next", 8)

    space = space_of(b, scores, y)

    assert Axis("table", 0) in space.axes
    assert [pin.node.name for pin in space.stored()] == ["weight_table"]


def test_a_weight_that_another_op_reads_is_stored_plain() -> None:
    b = Builder()
    x = looked_up(b)
    largest = b.call(aten.amax.default, b.weight("table", 16, 8), [0, 1])

    assert space_of(b, x, b.linear(x, "up", 8), largest).stored()


def test_a_weight_over_values_without_features_is_stored_plain() -> None:
    b = Builder()
    x = looked_up(b, 6)
    turned = b.call(PERMUTE, looked_up(b, key="other"), [0, 2, 1])
    results = b.linear(x, "shared", 4), b.linear(turned, "shared", 4)

    assert space_of(b, x, *results).stored()
    assert set(space_of(b, x, *results).reads) == {x}


def test_views_of_learned_positions_belong_to_the_stream() -> None:
    b = Builder()
    rows = b.call(aten.slice.Tensor, b.weight("positions", 9, 8), 0, 0, 6)
    y = b.call(ADD, looked_up(b), b.call(aten.unsqueeze.default, rows, 0))

    space = space_of(b, y, b.rms(y, "gain"))

    assert Axis("positions", 1) in space.axes
    assert kinds(space) == {("read", y.name)}


def test_readers_of_sizes_only_take_no_basis() -> None:
    b = Builder()
    x = b.linear(looked_up(b), "up", 12)
    zeros = b.call(aten.zeros_like.default, x)

    assert kinds(space_of(b, x, b.linear(x, "down", 8), zeros)) == set()


def test_entries_share_weights_and_slots() -> None:
    b = Builder("prefill")
    first = b.rms(looked_up(b), "gain")
    b.returns(first)
    c = Builder("decode", b.program)
    second = looked_up(c)

    assert len({n.graph for n in space_of(c, Axis("table", 1), c.rms(second, "gain")).nodes}) == 2


@pytest.mark.parametrize("width", [6, 8, 24])
def test_a_chain_of_blocks_is_one_stream(width: int) -> None:
    b = Builder()
    x = looked_up(b, width)
    for number in range(60):
        up = b.call(GELU, b.linear(b.rms(x), f"up{number}", 12))
        x = b.call(ADD, x, b.linear(up, f"down{number}", width))

    space = space_of(b, x, b.rms(x, "gain"))

    assert len(space.reads) == 60
    assert len(space.axes) == 121
    assert Pipeline((RotateHadamard(),)).run(b.program)[1].rows[0].error < 1e-5
