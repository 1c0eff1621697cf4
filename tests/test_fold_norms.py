"""Norm scales and shifts move into the layers that read them, and only there; layer norms become RMS norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from sylvester.compiler.ledger import Row
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.fold_norms import FoldNorms
from tests.graphs import (
    ADD,
    EMBEDDING,
    GELU,
    LAYER_NORM,
    LINEAR,
    MUL,
    PERMUTE,
    RESHAPE,
    RMS_NORM,
    Builder,
    aten,
    block,
    decoder,
)


def fold(program: Program, tied: str = "auto") -> tuple[Program, Row]:
    folded, ledger = Pipeline((FoldNorms(tied),)).run(program)  # type: ignore[arg-type]
    assert ledger.rows[0].error is not None
    assert ledger.rows[0].error < 3e-6
    return folded, ledger.rows[0]


def stream(b: Builder, width: int = 8, key: str = "table") -> fx.Node:
    return b.call(EMBEDDING, b.weight(key, 16, width), b.ids(2, 6, high=16))


def affine(program: Program) -> list[fx.Node]:
    """Norms that still have a scale or a shift."""
    norms = [n for entry in program.entries.values() for n in entry.calls(LAYER_NORM, RMS_NORM)]
    return [n for n in norms if any(isinstance(a, fx.Node) for a in n.args[1:])]


def reasons(row: Row) -> list[str]:
    return [refused.reason for refused in row.changes.refused]


def test_scale_and_shift_go_into_weight_and_bias() -> None:
    b = Builder()
    n = b.layer_norm(b.input(3, 8), "norm")
    program = b.returns(b.linear(n, "bare", 5), b.linear(n, "biased", 7, bias=True))
    gain, shift = program.weights["norm.weight"].double(), program.weights["norm.bias"].double()
    weight, bias = program.weights["biased.weight"].double(), program.weights["biased.bias"].double()

    folded, row = fold(program)

    assert affine(folded) == []
    assert set(folded.weights) == {"bare.weight", "bare.bias.folded", "biased.weight", "biased.bias.folded"}
    torch.testing.assert_close(folded.weights["biased.weight"], (weight * gain).float())
    torch.testing.assert_close(folded.weights["biased.bias.folded"], (bias + weight @ shift).float())
    assert row.changes.counts() == {"fold": 1}


def test_the_weights_of_the_given_program_stay() -> None:
    program = decoder("layer_norm")
    before = {key: tensor.clone() for key, tensor in program.weights.items()}

    fold(program)

    assert all(torch.equal(program.weights[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
@pytest.mark.parametrize("tied", [False, True])
def test_no_affine_norm_is_left(norm: str, tied: bool) -> None:
    folded, row = fold(decoder(norm, tied=tied), "split")

    assert affine(folded) == []
    assert folded.main.calls(LAYER_NORM) == []
    assert row.changes.counts()["fold"] == 5
    assert row.changes.refused == []


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_epsilon_is_the_one_of_the_model(eps: float) -> None:
    b = Builder()
    x = block(b, stream(b), "block", lambda x, key: b.layer_norm(x, key, eps=eps), 2)

    folded, _ = fold(b.returns(b.linear(b.layer_norm(x, "final", eps=eps), "head", 5)))

    assert [n.args[2] for n in folded.main.calls(RMS_NORM)] == [eps] * 3


def test_views_between_norm_and_layer() -> None:
    b = Builder()
    n = b.layer_norm(stream(b), "norm")
    first = b.call(aten.select.int, n, 1, 0)
    mean = b.call(aten.mean.dim, b.call(RESHAPE, n, [12, 8]), [0])

    folded, _ = fold(b.returns(b.linear(first, "a", 5), b.linear(mean, "b", 5)))

    assert affine(folded) == []


@pytest.mark.parametrize(
    "between",
    [
        lambda b, n: b.call(MUL, n, 0.3),
        lambda b, n: b.call(MUL, b.input(2, 6, 1), n),
        lambda b, n: b.call(aten.neg.default, n),
        lambda b, n: b.call(ADD, n, n),
        lambda b, n: b.call(aten.sum.dim_IntList, n, [1]),
    ],
)
def test_a_scale_passes_what_a_shift_does_not(between: Callable[[Builder, fx.Node], fx.Node]) -> None:
    for norm, left in (("rms", 0), ("layer_norm", 1)):
        b = Builder()
        n = b.rms(stream(b), "norm") if norm == "rms" else b.layer_norm(stream(b), "norm")

        folded, _ = fold(b.returns(b.linear(between(b, n), "w", 4)))

        assert len(affine(folded)) == left


def unlike(b: Builder, n: fx.Node) -> fx.Node:
    other = b.layer_norm(stream(b, key="second"), "other")
    return b.call(ADD, b.linear(n, "same", 4), b.linear(other, "same", 4))


REFUSED: dict[str, Callable[[Builder, fx.Node], fx.Node]] = {
    "twice the shift": lambda b, n: b.linear(b.call(MUL, n, 2.0), "w", 4),
    "other sign of the shift": lambda b, n: b.linear(b.call(aten.neg.default, n), "w", 4),
    "a sum of tokens": lambda b, n: b.linear(b.call(aten.sum.dim_IntList, n, [1]), "w", 4),
    "a sum with itself": lambda b, n: b.linear(b.call(ADD, n, n), "w", 4),
    "a sum with a weight": lambda b, n: b.linear(b.call(ADD, n, b.weight("v", 8)), "w", 4),
    "a norm without scale": lambda b, n: b.linear(b.rms(n), "w", 4),
    "parts of the features": lambda b, n: b.linear(b.call(RESHAPE, n, [2, 6, 2, 4]), "w", 4),
    "tokens as features": lambda b, n: b.linear(b.call(RESHAPE, n, [2, 48]), "w", 4),
    "attention": lambda b, n: b.linear(b.joined(b.attention(*[b.heads(n, 1)] * 3)), "w", 4),
    "a residual": lambda b, n: b.call(ADD, n, b.linear(n, "w", 8)),
    "another norm": unlike,
    "a computed scale": lambda b, n: b.linear(b.call(RMS_NORM, n, b.call(ADD, b.gain("g", 8), 1.0), 1e-6), "w", 4),
    "two axes": lambda b, n: b.linear(
        b.call(LAYER_NORM, n, [6, 8], b.weight("gains", 6, 8), b.weight("shifts", 6, 8), 1e-5), "w", 4
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_norms_that_cannot_be_folded_are_left_with_a_reason(case: str) -> None:
    b = Builder()
    program = b.returns(REFUSED[case](b, b.layer_norm(stream(b), "norm")))

    folded, row = fold(program)

    assert affine(folded)
    assert any(reasons(row))


def test_a_sum_with_a_weight_keeps_the_scale() -> None:
    b = Builder()
    total = b.call(ADD, b.rms(stream(b), "norm"), b.weight("v", 8))

    folded, _ = fold(b.returns(b.linear(total, "w", 4)))

    assert len(affine(folded)) == 1


def test_a_weight_that_something_else_reads_is_not_scaled() -> None:
    b = Builder()
    y = b.linear(b.rms(stream(b), "norm"), "w", 8)
    program = b.returns(y, b.call(aten.amax.default, b.weight("w.weight", 8, 8), [0]))

    folded, row = fold(program)

    assert len(affine(folded)) == 1
    assert reasons(row) == [
        "not only linear layers read the norm: amax does not commute with a rotation of its features"
    ]


def test_an_output_keeps_the_norm() -> None:
    b = Builder()
    n = b.layer_norm(stream(b), "norm")

    _, row = fold(b.returns(n, b.linear(n, "w", 4)))

    assert reasons(row) == ["not only linear layers read the norm: it is the output 'y0'"]


def test_all_that_writes_the_stream_is_centred() -> None:
    folded, _ = fold(decoder("layer_norm"))

    for key in ("table", "block0.o.weight", "block0.down.weight", "block1.o.bias", "block1.down.bias"):
        axis = 1 if key == "table" else 0
        assert folded.weights[key].mean(axis).abs().max() < 1e-7


def test_positions_in_parts_are_centred() -> None:
    b = Builder()
    rows = b.call(aten.unsqueeze.default, b.call(aten.slice.Tensor, b.weight("positions", 9, 8), 0, 0, 6), 0)
    x = block(b, b.call(ADD, stream(b), rows), "block", b.layer_norm, 2)

    folded, _ = fold(b.returns(b.linear(b.layer_norm(x, "final"), "head", 5)))

    assert folded.main.calls(LAYER_NORM) == []
    assert folded.weights["positions"].mean(1).abs().max() < 1e-7


UNCENTRED: dict[str, Callable[[Builder, fx.Node], fx.Node]] = {
    "an RMS norm": lambda b, x: b.rms(x),
    "a linear layer": lambda b, x: b.linear(x, "other", 8),
    "an output": lambda b, x: x,
    "attention": lambda b, x: b.attention(*[b.heads(x, 1)] * 3),
    "a table of rows": lambda b, x: b.call(LINEAR, x, b.weight("table", 16, 8)),
    "a layer norm of two axes": lambda b, x: b.call(LAYER_NORM, x, [6, 8]),
    "a layer norm of tokens": lambda b, x: b.call(LAYER_NORM, b.call(PERMUTE, x, [0, 2, 1]), [6]),
}


@pytest.mark.parametrize("case", UNCENTRED)
def test_a_stream_that_shows_its_mean_is_not_centred(case: str) -> None:
    b = Builder()
    x = block(b, stream(b), "block", b.layer_norm, 2)
    program = b.returns(UNCENTRED[case](b, x), b.linear(b.layer_norm(x, "final"), "head", 5))

    folded, row = fold(program)

    assert len(folded.main.calls(LAYER_NORM)) >= 3
    assert [refused.rule for refused in row.changes.refused].count("centre") == 1


def test_a_table_that_is_also_the_head_is_centred_after_it_is_read() -> None:
    folded, row = fold(decoder("layer_norm", tied=True), "online")

    assert row.changes.counts()["centre at run time"] == 1
    assert len(folded.main.calls(LAYER_NORM)) == 1
    assert torch.equal(folded.weights["table"], decoder("layer_norm", tied=True).weights["table"])


def test_centring_at_run_time_for_one_layer_norm_is_not_worth_it() -> None:
    b = Builder()
    y = b.linear(b.layer_norm(stream(b, 8, "w.weight"), "norm"), "up", 8)

    _, row = fold(b.returns(b.call(LINEAR, b.call(GELU, y), b.weight("w.weight", 16, 8))), "online")

    assert "centring it at run time costs as much as its layer norms do" in reasons(row)


@pytest.mark.parametrize(("vocabulary", "tied", "copies"), [(31, "auto", 2), (4000, "auto", 1), (4000, "split", 2)])
def test_what_a_tied_head_does(vocabulary: int, tied: str, copies: int) -> None:
    program = decoder("rms", blocks=1, tied=True, vocabulary=vocabulary)

    folded, row = fold(program, tied)

    tables = [key for key, tensor in folded.weights.items() if tensor.shape[0] == vocabulary]
    assert len(tables) == copies
    assert len(affine(folded)) == 2 - copies
    assert ("copy of its own" in row.changes.notes[0]) == (copies == 2)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="tied is 'both', expected 'auto', 'online' or 'split'"):
        FoldNorms("both")  # type: ignore[arg-type]


def test_text_of_the_pass() -> None:
    assert str(FoldNorms()) == "fold-norms"
    assert str(FoldNorms(tied="split")) == "fold-norms(tied='split')"
