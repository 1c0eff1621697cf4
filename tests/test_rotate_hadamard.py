"""Every rotation alone and together: same function, and the promised transforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx

from sylvester.compiler.calibration import Calibration
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import ContractBroken
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.fold_norms import FoldNorms
from sylvester.passes.rotate_hadamard import RotateHadamard
from tests.graphs import (
    ADD,
    EMBEDDING,
    GELU,
    LAYER_NORM,
    MUL,
    RMS_NORM,
    Builder,
    aten,
    block,
    decoder,
    dialect,
)
from tests.rotating import HADAMARD, MIXED, NONE, attended, reasons, rotate, stream, transforms


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
@pytest.mark.parametrize(
    ("options", "rules", "online"),
    [
        ({**NONE}, set(), 0),
        ({**NONE, "residual": True}, {"fold", "residual"}, 0),
        ({**NONE, "values": True}, {"values"}, 0),
        ({**NONE, "keys": True}, {"keys"}, 0),
        ({**NONE, "ffn": True}, {"ffn"}, 2),
        ({**NONE, "heads": True}, {"heads"}, 2),
        ({}, {"fold", "residual", "values", "ffn"}, 2),
        ({"online": False}, {"fold", "residual", "values"}, 0),
        ({"keys": True, "heads": True}, {"fold", "residual", "values", "ffn", "keys", "heads"}, 4),
    ],
)
def test_each_rotation_alone_and_together(norm: str, options: dict[str, bool], rules: set[str], online: int) -> None:
    """Two blocks without rotary positions: all is folded but one transform per block for ffn and heads."""
    done, changes = rotate(decoder(norm), RotateHadamard(**options))

    assert set(changes.counts()) - {"layer norm to RMS norm"} == rules
    assert transforms(done) == online
    assert changes.refused == []


def test_folded_rotations_add_no_nodes_and_leave_no_affine_norm() -> None:
    program = decoder()

    done, _ = rotate(program, RotateHadamard(ffn=False))

    assert len(done.main.calls()) == len(program.main.calls())
    assert all(norm.args[1] is None for norm in done.main.calls(RMS_NORM))


def test_weights_change_and_the_given_program_does_not() -> None:
    program = decoder()
    before = {key: tensor.clone() for key, tensor in program.weights.items()}

    done, _ = rotate(program, RotateHadamard(keys=True))

    assert all(torch.equal(program.weights[key], tensor) for key, tensor in before.items())
    same = {key for key in before if key in done.weights and torch.equal(done.weights[key], before[key])}
    assert same == {"block0.up.bias", "block1.up.bias"}


def roped(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(dialect.rope.default, x, b.weight("cos", 6, 4), b.weight("sin", 6, 4), False)


def test_keys_behind_rotary_positions_take_two_transforms() -> None:
    b = Builder()
    program = b.returns(b.linear(attended(b, roped), "o", 8))

    done, changes = rotate(program, RotateHadamard(**NONE, keys=True))
    refused = rotate(program, RotateHadamard(**NONE, keys=True, online=False))

    assert transforms(done) == 2
    assert changes.notes == ["keys: Hadamard matrix of order 4 = 2^2 (Sylvester), 2 transforms in forward, x1"]
    assert transforms(refused[0]) == 0
    assert reasons(refused[1]) == {("keys", "rope does not commute with a rotation of its features")}


def cached(program: Program, name: str, tokens: int) -> Program:
    """An entry that appends rotary keys and plain values to caches and attends to them."""
    b = Builder(name, program)
    x = b.call(EMBEDDING, b.weight("table", 16, 8), b.ids(1, tokens, high=16))
    past = b.given(torch.tensor(2))
    angles = (b.call(aten.slice.Tensor, b.weight(key, 9, 4), 0, 0, tokens) for key in ("cos", "sin"))
    cos, sin = angles
    q, k, v = (b.heads(b.linear(x, part, 8), 2) for part in "qkv")
    q, k = (b.call(dialect.rope.default, part, cos, sin, False) for part in (q, k))
    keys, values = (
        b.call(dialect.kv_update.default, b.state(key, 1, 2, 16, 4), new, past)
        for key, new in (("keys", k), ("values", v))
    )
    out = b.call(dialect.attention.default, q, keys, values, None, past, 0.5, True, 0)
    return b.returns(b.linear(b.joined(out), "o", 8), keys=keys, values=values)


def test_caches_change_their_basis_in_all_entries() -> None:
    program = cached(cached(Program(decoder().weights, {}), "prefill", 5), "decode", 1)

    done, changes = rotate(program, RotateHadamard(**{**NONE, "values": True}, keys=True))

    assert set(changes.bases) == {"keys", "values"}
    assert [transforms(done, name) for name in ("prefill", "decode")] == [2, 2]
    assert {user.target for n in done.entries["decode"].placeholders("state") for user in n.users} == {
        dialect.kv_update.default
    }


class Silent(RotateHadamard):
    """Does not say that it changed the basis of the caches."""

    def run(self, program: Program) -> Changes:
        changes = super().run(program)
        changes.bases.clear()
        return changes


def test_a_change_of_basis_that_is_not_declared_is_caught() -> None:
    program = cached(Program(decoder().weights, {}), "decode", 1)

    with pytest.raises(ContractBroken, match="of entry 'decode' changed"):
        Pipeline((Silent(keys=True),))(program)


def test_a_second_rotation_starts_from_the_first_basis() -> None:
    program = cached(Program(decoder().weights, {}), "decode", 1)
    everything = RotateHadamard(keys=True, heads=True, seed=1)

    done, changes = rotate(program, everything, RotateHadamard(keys=True, heads=True, seed=2))

    assert set(changes.bases) == {"keys"}
    assert {("ffn", "it is the result of a transform"), ("values", MIXED)} <= reasons(changes)
    assert transforms(done, "decode") == transforms(rotate(program, everything)[0], "decode") + 2


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
def test_twice_with_one_seed_stays_exact(norm: str) -> None:
    program = decoder(norm, tied=True, vocabulary=3000)

    rotate(program, *[RotateHadamard(keys=True, heads=True, tied="online")] * 3)


def test_a_tied_head_costs_two_transforms_and_keeps_its_norm() -> None:
    program = decoder(tied=True, vocabulary=3000)

    kept, changes = rotate(program, RotateHadamard(ffn=False))
    own, _ = rotate(program, RotateHadamard(ffn=False, tied="split"))

    assert transforms(kept) == 2
    assert transforms(own) == 0
    assert len(kept.weights) == len(own.weights)  # own has the copy, kept has the scale of the last norm
    assert kept.main.calls(MUL) == []
    assert "kept as one" in changes.notes[0]


def test_a_tied_head_without_online_transforms_is_not_rotated() -> None:
    done, changes = rotate(decoder(tied=True, vocabulary=3000), RotateHadamard(online=False))

    assert transforms(done) == 0
    assert ("residual", "rms_norm does not commute with a rotation of its features") in reasons(changes)


def post_norm(blocks: int = 2) -> Program:
    """BERT's order: norms of sums, whose results are the stream."""
    b = Builder()
    x = b.layer_norm(stream(b, 24), "first")
    for number in range(blocks):
        q, k, v = (b.heads(b.linear(x, f"{number}.{part}", 24, bias=True), 3) for part in "qkv")
        x = b.layer_norm(b.call(ADD, x, b.linear(b.joined(b.attention(q, k, v)), f"{number}.o", 24)), f"{number}.n1")
        up = b.call(GELU, b.linear(x, f"{number}.up", 52))
        x = b.layer_norm(b.call(ADD, x, b.linear(up, f"{number}.down", 24, bias=True)), f"{number}.n2")
    return b.returns(x)


def test_post_norm_models_get_block_local_and_online_rotations() -> None:
    done, changes = rotate(post_norm(), RotateHadamard())

    assert changes.counts() == {"inputs": 4, "values": 2, "ffn": 2}
    assert transforms(done) == 6
    assert len(done.main.calls(LAYER_NORM)) == 5
    assert "the stream would take 2 transforms at run time, the inputs of its layers 1" in str(changes)
    assert torch.equal(done.weights["table"], post_norm().weights["table"])


def test_post_norm_models_without_online_transforms_keep_what_is_folded() -> None:
    done, changes = rotate(post_norm(), RotateHadamard(online=False))

    assert changes.counts() == {"values": 2}
    assert transforms(done) == 0


def test_sandwich_norms_are_rotated_where_they_enter_the_stream() -> None:
    b = Builder()
    x = stream(b, 24)
    for number in range(3):
        n = b.rms(x, f"{number}.before")
        up = b.call(GELU, b.linear(n, f"{number}.up", 52))
        x = b.call(ADD, x, b.rms(b.linear(up, f"{number}.down", 24), f"{number}.after"))

    done, changes = rotate(b.returns(b.linear(b.rms(x, "final"), "head", 16)), RotateHadamard(ffn=False))

    assert changes.counts() == {"fold": 4, "residual": 1}
    assert transforms(done) == 3
    assert reasons(changes) == {("fold", "no linear layer reads the norm")}


def test_layer_scale_with_a_vector_makes_each_branch_plain() -> None:
    b = Builder()
    x = stream(b, 24)
    for number in range(3):
        up = b.call(GELU, b.linear(b.rms(x, f"{number}.norm"), f"{number}.up", 52))
        x = b.call(ADD, x, b.call(MUL, b.linear(up, f"{number}.down", 24), b.gain(f"{number}.scale", 24)))

    done, changes = rotate(b.returns(b.linear(b.rms(x, "final"), "head", 16)), RotateHadamard(ffn=False))

    assert transforms(done) == 3
    assert changes.counts() == {"fold": 4, "residual": 1}


def test_parallel_blocks_share_one_normed_value() -> None:
    b = Builder()
    x = stream(b, 24)
    n = b.layer_norm(x, "norm")
    q, k, v = (b.heads(b.linear(n, part, 24), 3) for part in "qkv")
    up = b.call(GELU, b.linear(n, "up", 52, bias=True))
    both = b.call(ADD, b.linear(b.joined(b.attention(q, k, v)), "o", 24), b.linear(up, "down", 24, bias=True))
    y = b.linear(b.layer_norm(b.call(ADD, x, both), "final"), "head", 16)

    _, changes = rotate(b.returns(y), RotateHadamard())

    assert changes.counts() == {"fold": 2, "layer norm to RMS norm": 2, "residual": 1, "values": 1, "ffn": 1}


def test_two_streams_get_rotations_of_their_own() -> None:
    """Cross-attention reads the encoder's stream and writes to the decoder's."""
    b = Builder()
    source, target = block(b, stream(b, 24, "a"), "encoder", b.rms), stream(b, 12, "b")
    memory = b.rms(source, "memory")
    q = b.heads(b.linear(b.rms(target, "cross"), "q", 12), 3)
    k, v = (b.heads(b.linear(memory, part, 12), 3) for part in "kv")
    target = b.call(ADD, target, b.linear(b.joined(b.attention(q, k, v)), "o", 12))

    done, changes = rotate(b.returns(b.linear(b.rms(target, "final"), "head", 16)), RotateHadamard(ffn=False))

    assert changes.counts()["residual"] == 2
    assert transforms(done) == 0


def test_seeds_choose_the_signs() -> None:
    one, two, again = (rotate(decoder(), RotateHadamard(seed=seed))[0].weights["table"] for seed in (0, 1, 0))

    assert torch.equal(one, again)
    assert not torch.allclose(one, two)


def outlying() -> Program:
    """Three rows of an FFN and of the values, and three channels of the stream, are 30 times larger."""
    program = decoder(width=48)
    for up, down in (("block0.up", "block0.down"), ("block1.v", "block1.o")):
        rows = torch.tensor([1, 7, 20])
        for key, axis, factor in ((f"{up}.weight", 0, 30), (f"{up}.bias", 0, 30), (f"{down}.weight", 1, 1 / 30)):
            scaled = program.weights[key].clone()
            scaled.index_copy_(axis, rows, scaled.index_select(axis, rows) * factor)
            program.weights[key] = scaled
    table = program.weights["table"].clone()
    table[:, :3] *= 30
    program.weights["table"] = table
    program.calibration = Calibration(tuple({"x0": torch.randint(31, (2, 5))} for _ in range(4)), ())
    return program


def test_outliers_become_even() -> None:
    _, changes = rotate(outlying(), RotateHadamard())
    figures = {(f.where, f.name): f.value for f in changes.figures}

    assert len({where for where, _ in figures}) == 13
    for where in ("block0.q.weight", "block0.up.weight", "block0.down.weight", "block1.q.weight", "head"):
        assert figures[where, "kurtosis before"] > 6
        assert figures[where, "kurtosis after"] < 4
        assert figures[where, "max/rms after"] < 0.7 * figures[where, "max/rms before"]


def test_rotations_within_and_across_heads_do_not_undo_each_other() -> None:
    """Two Hadamard matrices would: H (I x H) = H x I mixes features of one place only."""
    _, changes = rotate(outlying(), RotateHadamard(heads=True))
    after = {f.where: f.value for f in changes.figures if f.name == "kurtosis after"}
    before = {f.where: f.value for f in changes.figures if f.name == "kurtosis before"}

    assert after["block1.o.weight"] < 0.2 * before["block1.o.weight"]
    assert any(note.startswith("values: random orthogonal matrix of order 16, folded") for note in changes.notes)


def test_no_figures_without_calibration() -> None:
    assert rotate(decoder(), RotateHadamard())[1].figures == []


def quantised(x: Tensor) -> Tensor:
    scale = x.abs().max() / 127
    return (x / scale).round().clamp(-127, 127) * scale


def test_int8_error_of_a_layer_with_outlying_channels() -> None:
    b = Builder()
    x, weight = torch.randn(512, 768), torch.randn(256, 768) / math.sqrt(768)
    x[:, torch.randperm(768)[:6]] *= 30
    program = b.returns(b.linear(b.given(x), "w", 256))
    program.weights["w.weight"] = weight

    done, _ = rotate(program, RotateHadamard())

    turned = dialect.hadamard.default(x, done.main.calls(HADAMARD)[0].args[1])
    exact = x.double() @ weight.double().T
    errors = [
        float((quantised(a) @ quantised(w).T - exact).norm() / exact.norm())
        for a, w in ((turned, done.weights["w.weight"]), (x, weight))
    ]
    assert errors[0] <= 0.3 * errors[1]


def test_folding_the_norms_first_changes_nothing_for_the_rotation() -> None:
    done, ledger = Pipeline((FoldNorms(), RotateHadamard(ffn=False))).run(decoder("layer_norm"))

    assert transforms(done) == 0
    assert ledger.rows[1].changes.counts() == {"residual": 1, "values": 2}
