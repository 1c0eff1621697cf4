"""Where a rotation must stop: what is refused, with which reason, and options that do not exist."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import fx

from sylvester.passes.rotate_hadamard import RotateHadamard
from tests.graphs import (
    ADD,
    EMBEDDING,
    GELU,
    LINEAR,
    MUL,
    PERMUTE,
    RESHAPE,
    Builder,
    aten,
    block,
    decoder,
)
from tests.rotating import HADAMARD, NONE, attended, reasons, rotate, stream, transforms


def test_a_norm_that_others_read_keeps_its_signs() -> None:
    """Signs may pass a norm with a scale only where nothing plain reads it."""
    b = Builder()
    x = b.call(EMBEDDING, b.weight("table", 3000, 8), b.ids(2, 6, high=3000))
    for number in range(3):
        x = block(b, x, f"block{number}", b.rms, 2)
    n = b.rms(x, "final")

    done, changes = rotate(b.returns(b.call(LINEAR, n, b.weight("table", 3000, 8)), n), RotateHadamard())

    assert changes.counts()["residual"] == 1
    assert len(done.main.calls(MUL)) == 2


@pytest.mark.parametrize("width", [6, 7, 30, 54, 118])
def test_widths_without_a_matrix_are_rotated_where_it_is_free(width: int) -> None:
    """Folded rotations can be any orthogonal matrix; online ones are blocks of the largest order that divides."""
    b = Builder()
    x = stream(b, width)
    up = b.call(GELU, b.linear(b.rms(x, "norm"), "up", width))
    x = b.call(ADD, x, b.linear(up, "down", width))

    done, changes = rotate(b.returns(b.linear(b.rms(x, "final"), "head", 16)), RotateHadamard())

    assert f"residual: random orthogonal matrix of order {width}, folded, x1" in changes.notes
    assert transforms(done) == (1 if width % 2 == 0 else 0)
    odd = {("ffn", f"no Hadamard matrix has an order that divides {width}")}
    assert reasons(changes) == (odd if width % 2 else set())


PINNED: dict[str, tuple[str, Callable[[Builder, fx.Node], list[fx.Node]]]] = {
    "weight of the values elsewhere": (
        "values",
        lambda b, o: [b.call(aten.amax.default, b.weight("v.weight", 8, 8), [0])],
    ),
    "values as an output": ("values", lambda b, o: [o]),
    "values by another op": ("values", lambda b, o: [b.call(GELU, o)]),
}


@pytest.mark.parametrize("case", PINNED)
def test_values_that_something_else_reads_are_refused(case: str) -> None:
    rule, more = PINNED[case]
    b = Builder()
    out = attended(b)

    done, changes = rotate(b.returns(b.linear(out, "o", 8), *more(b, out)), RotateHadamard(**{**NONE, "values": True}))

    assert transforms(done) == 0
    assert {r for r, _ in reasons(changes)} == {rule}


def test_keys_with_features_on_another_axis_are_refused() -> None:
    b = Builder()
    q, k, v = (b.heads(b.linear(stream(b, 8, f"{part}.table"), part, 8), 2) for part in "qkv")
    turned = b.call(PERMUTE, k, [0, 1, 3, 2])

    done, changes = rotate(b.returns(b.attention(q, k, v), turned), RotateHadamard(**NONE, keys=True))

    assert transforms(done) == 0
    assert reasons(changes) == {("keys", "its features are not the last axis")}


def test_keys_that_are_values_are_rotated_once() -> None:
    b = Builder()
    q, k = (b.heads(b.linear(stream(b, 8, f"{part}.table"), part, 8), 2) for part in "qk")
    y = b.linear(b.joined(b.attention(q, k, k)), "o", 8)

    _, changes = rotate(b.returns(y), RotateHadamard(**NONE, keys=True))

    assert changes.counts() == {"keys and values": 1}


def test_a_layer_shared_with_another_op_is_refused_alone() -> None:
    b = Builder()
    x, y = (b.call(GELU, stream(b, 8, key)) for key in "ab")
    largest = b.call(aten.amax.default, b.weight("shared.weight", 8, 8), [0])
    results = b.linear(x, "shared", 8), b.linear(x, "own", 8), b.linear(y, "other", 8)

    done, changes = rotate(b.returns(*results, largest), RotateHadamard())

    assert transforms(done) == 1
    assert reasons(changes) == {
        ("ffn", "own.weight, shared.weight is read by more than linear layers over such a value")
    }


def test_one_weight_over_two_values_turns_both() -> None:
    b = Builder()
    results = [b.linear(b.call(GELU, stream(b, 12, key)), "shared", 8) for key in "ab"]

    done, changes = rotate(b.returns(*results), RotateHadamard())

    assert changes.counts() == {"ffn": 2}
    assert transforms(done) == 2


def test_one_weight_over_a_transform_and_a_plain_value_is_left_alone() -> None:
    b = Builder()
    x = b.call(HADAMARD, b.input(2, 6, 12), 12)
    results = b.linear(x, "shared", 8), b.linear(b.call(GELU, stream(b, 12)), "shared", 8)

    done, changes = rotate(b.returns(*results), RotateHadamard())

    assert transforms(done) == 1
    assert changes.applied == []


def test_text_of_the_pass() -> None:
    assert str(RotateHadamard()) == "rotate-hadamard"
    given = RotateHadamard(keys=True, online=False, tied="split", seed=3)
    assert str(given) == "rotate-hadamard(keys=True, online=False, tied='split', seed=3)"
    assert eval(str(given).replace("rotate-hadamard", "RotateHadamard")) == given


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tied": "both"}, ValueError, "tied is 'both'"),
        ({"keys": "yes"}, TypeError, "keys is 'yes', expected True or False"),
        ({"ffn": 1}, TypeError, "ffn is 1, expected True or False"),
        ({"seed": -1}, ValueError, "seed is -1, expected a whole number from 0"),
        ({"seed": None}, ValueError, "seed is None"),
    ],
)
def test_wrong_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RotateHadamard(**options)  # type: ignore[arg-type]


def test_thirty_two_layers_are_analysed_in_little_time() -> None:
    """Every weight and value is visited once; the pass itself must not be quadratic in the depth."""
    done, changes = rotate(decoder(blocks=32), RotateHadamard(keys=True))

    assert changes.counts()["values"] == 32
    assert transforms(done) == 32


def test_a_reshaped_stream_is_rotated_in_blocks() -> None:
    b = Builder()
    x = stream(b, 24)
    x = b.call(ADD, x, b.call(RESHAPE, b.linear(b.call(RESHAPE, x, [2, 6, 3, 8]), "small", 8), [2, 6, 24]))

    done, changes = rotate(b.returns(b.linear(b.rms(x, "final"), "head", 16)), RotateHadamard())

    assert transforms(done) == 0
    assert changes.notes == ["residual: randomised Hadamard matrix of order 8 = 2^3 (Sylvester), folded, x1"]
