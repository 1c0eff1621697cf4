"""Activations zeroed below thresholds: what is rewritten, how many zeros that makes, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.backends.packed_weights import stored_tensors
from sylvester.codegen.compile import compile_program
from sylvester.codegen.layout import Layout
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import OPS
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.quantize import Quantize
from sylvester.passes.rotate_hadamard import RotateHadamard
from sylvester.passes.sparsify_activations import SparsifyActivations
from tests import zoo
from tests.programs import ops, program

WIDTH, HIDDEN = 24, 64
EVERYWHERE = SparsifyActivations(phase="all")
ZEROS = "a layer over it skips weights where thresholds left zeros, which a transform would fill"


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return x + F.linear(OPS["swiglu"](F.linear(x, gate), F.linear(x, up, bias)), down)


def weights(spread: float = 1.0) -> dict[str, Tensor]:
    """Channels of `up` differ in size from 1 / spread to spread."""
    scale = torch.logspace(-1, 1, HIDDEN).log() / torch.tensor(10.0).log()
    up = torch.randn(HIDDEN, WIDTH) / WIDTH**0.5 * (spread**scale)[:, None]
    return {
        "gate.weight": torch.randn(HIDDEN, WIDTH) / WIDTH**0.5 * 2,
        "up.weight": up,
        "down.weight": torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5,
        "up.bias": torch.randn(HIDDEN) / 10,
    }


def calibrated(made: Program, rows: int = 40, count: int = 4) -> Program:
    """With normal inputs to fit to, and others held back."""
    key, shape = "x0", made.main.examples["x0"].shape
    draw = [{key: torch.randn(*shape[:-2], rows, shape[-1])} for _ in range(2 * count)]
    made.calibration = Calibration(tuple(draw[:count]), tuple(draw[count:]))
    return made


def one(function: Callable[..., Tensor] = gated, spread: float = 1.0, **more: Tensor) -> Program:
    given = {**weights(spread), **more}
    named = {key.replace(".", "_"): value for key, value in given.items()}
    return calibrated(program(function, torch.randn(2, 5, WIDTH), weights=named))


def apply(made: Program, *steps: Pass) -> tuple[Program, Changes]:
    done, ledger = Pipeline(steps).run(made)
    return done, ledger.rows[-1].changes


def reasons(changes: Changes) -> list[tuple[str, str]]:
    return sorted({(refused.rule, refused.reason) for refused in changes.refused})


def run(made: Program, x: Tensor, entry: str = "forward") -> Tensor:
    return made.run(entry, {"x0": x})["y0"]


@pytest.fixture(scope="module")
def llama() -> Program:
    case = zoo.case("llama-gqa")
    made = zoo.traced(case.name).clone()
    data = [{"input_ids": torch.randint(3, zoo.VOCAB, (2, 60))} for _ in range(8)]
    made.calibration = Calibration(tuple(data[:6]), tuple(data[6:]))
    return made


def stored_bytes(made: Program, layouts: dict[str, Layout]) -> int:
    return sum(tensor.nbytes for tensor in stored_tensors(made, {"all": layouts.values()}).values())


def test_before_and_after():
    done, changes = apply(one(), EVERYWHERE)

    assert ops(done) == ["aten.linear", "sylvester.sparse_glu", "sylvester.sparse_linear", "aten.add.Tensor"]
    assert changes.counts() == {"ffn": 1}
    assert done.weights["down_weight.thresholds"].shape == (HIDDEN,)


def test_the_rewritten_part_is_the_dense_one_with_zeros():
    made = one()
    done, _ = apply(made, EVERYWHERE)
    x, w = torch.randn(2, 5, WIDTH), made.weights
    a = F.silu(F.linear(x, w["gate_weight"]))
    kept = a * (a.abs() > done.weights["down_weight.thresholds"])
    expected = x + F.linear(kept * F.linear(x, w["up_weight"], w["up_bias"]), w["down_weight"])

    torch.testing.assert_close(run(done, x), expected, rtol=1e-5, atol=1e-5)


def test_thresholds_are_those_of_the_paper():
    """t_i = sqrt(T / m_i), where half of all a_i^2 m_i on the data are at most T."""
    made = one(spread=4.0)
    done, _ = apply(made, EVERYWHERE)
    x = torch.cat([s["x0"].flatten(0, -2) for s in made.calibration.fit])
    a = F.silu(F.linear(x, made.weights["gate_weight"])).double()
    mean = F.linear(x, made.weights["up_weight"], made.weights["up_bias"]).double().square().mean(0)
    least = torch.quantile((a.square() * mean).flatten(), 0.5)

    levels = done.weights["down_weight.thresholds"].double()
    torch.testing.assert_close(levels, (least / mean).sqrt(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_zeros_on_held_out_data_are_as_asked_for(sparsity):
    _, changes = apply(one(), SparsifyActivations(sparsity, phase="all"))

    found = {figure.name: figure.value for figure in changes.figures}
    assert found["ffn zeros % on calibration data"] == pytest.approx(100 * sparsity, abs=0.2)
    assert found["ffn zeros % on held-out data"] == pytest.approx(100 * sparsity, abs=3)


def test_thresholds_by_channel_lose_less_than_one_for_the_layer():
    made = one(spread=10.0)
    x = torch.randn(4, 50, WIDTH)
    errors = {}
    for kind in ("channel", "layer"):
        done, _ = apply(made, SparsifyActivations(phase="all", thresholds=kind))
        errors[kind] = float((run(done, x) - run(made, x)).norm())

    assert errors["channel"] < 0.5 * errors["layer"]


def test_a_channel_that_is_multiplied_by_zero_is_never_needed():
    given = weights()
    given["up.weight"][3], given["up.bias"][3] = 0, 0
    done, _ = apply(one(**given), EVERYWHERE)

    levels = done.weights["down_weight.thresholds"]
    assert levels[3] == torch.inf
    assert levels.isfinite().sum() == HIDDEN - 1
    assert run(done, torch.randn(2, 5, WIDTH)).isfinite().all()


def test_only_decoding_is_rewritten_and_weights_stay_one_copy(llama):
    done, changes = apply(llama, SparsifyActivations())

    pair = ("sylvester.sparse_glu", "sylvester.sparse_linear")
    counts = {name: [ops(done, name).count(op) for op in pair] for name in done.entries}
    assert counts == {"prefill": [0, 0], "decode": [4, 4], "start": [0, 0]}
    assert changes.counts() == {"ffn": 4}
    assert {(layer.part, layer.what) for layer in changes.layers} == {("ffn", "50% zeros")}
    added = set(done.weights) - set(llama.weights)
    assert len(added) == 4
    assert done.weights.nbytes == llama.weights.nbytes + 4 * 4 * 120


def test_keys_and_values_are_those_of_the_dense_layer(llama):
    """Of the first layer, whose input no threshold has changed."""
    done, changes = apply(llama, SparsifyActivations(attention=True))
    ids, past = torch.randint(3, zoo.VOCAB, (1, 1)), torch.tensor(5)
    state = {key: torch.randn(1, *(int(n) for n in slot.shape[1:])) for key, slot in llama.state.items()}
    dense, sparse = (p.run("decode", {"input_ids": ids, "past": past}, state) for p in (llama, done))

    assert changes.counts() == {"ffn": 4, "query": 4, "attention output": 4}
    assert ops(done, "decode").count("sylvester.zero_small") == 8
    assert torch.equal(dense["k0"], sparse["k0"])
    assert torch.equal(dense["v0"], sparse["v0"])
    assert not torch.equal(dense["k1"], sparse["k1"])
    held = [f.value for f in changes.figures if f.name.endswith("zeros % on held-out data")]
    assert len(held) == 12
    assert max(abs(value - 50) for value in held) < 9


def test_compiled_decoding_agrees_with_the_program(llama):
    done, _ = apply(llama, SparsifyActivations(attention=True))
    prompt = torch.randint(3, zoo.VOCAB, (1, 9))
    with sv.compile(done, threads=2) as compiled, sv.compile(done, target="reference") as plain:
        assert compiled.generate(prompt, 12).tolist() == plain.generate(prompt, 12).tolist()


def test_an_artefact_stores_weights_once(llama):
    """Rows of 120 hidden features were padded to 128 in panels of `up`, and are not by rows."""
    done, _ = apply(llama, SparsifyActivations())

    layouts = [
        {layout.name: layout for of_entry in compile_program(made).weights.values() for layout in of_entry}
        for made in (llama, done)
    ]
    before, after = (stored_bytes(llama if n == 0 else done, layouts[n]) for n in range(2))
    keys = [key for layout in layouts[1].values() for key in layout.keys if key]
    assert len(keys) == len(set(keys))
    assert after == before + 4 * 4 * 120 - 4 * 4 * 8 * 64


def test_rotations_decline_the_edges_with_thresholds_and_stay_exact(llama):
    done, _ = apply(llama, SparsifyActivations(attention=True))

    turned, ledger = Pipeline((RotateHadamard(heads=True),)).run(done)

    changes = ledger.rows[0].changes
    assert ledger.rows[0].error < 1e-5
    assert ("ffn", ZEROS) in reasons(changes)
    assert ("heads", ZEROS) in reasons(changes)
    assert any(rule == "values" for rule, _ in reasons(changes))
    assert {"ffn", "heads", "values"}.isdisjoint(changes.counts())
    hadamards = [n for n in turned.entries["decode"].calls(torch.ops.sylvester.hadamard.default)]
    assert not any(u.target is torch.ops.sylvester.sparse_linear.default for n in hadamards for u in n.users)


def test_rotations_of_what_has_no_threshold_go_on(llama):
    done, _ = apply(llama, SparsifyActivations())

    _, ledger = Pipeline((RotateHadamard(),)).run(done)

    changes = ledger.rows[0].changes
    assert ledger.rows[0].error < 1e-5
    assert reasons(changes) == [("ffn", ZEROS)]
    assert changes.counts()["values"] == 4
    assert changes.counts()["residual"] >= 1


def test_parts_that_are_rotated_already_are_refused(llama):
    turned, _ = apply(llama, RotateHadamard(residual=False, heads=True))

    done, changes = apply(turned, SparsifyActivations(attention=True))

    rotated = "it is rotated before the layer that reads it, which would fill the zeros"
    assert reasons(changes) == [("attention output", rotated), ("ffn", rotated)]
    assert changes.counts() == {"query": 4}
    assert "sylvester.sparse_glu" not in ops(done, "decode")


@pytest.mark.parametrize("phase", ["decode", "all"])
def test_weights_that_are_skipped_stay_in_float(llama, phase):
    done, _ = apply(llama, SparsifyActivations(phase=phase))

    after, changes = apply(done, Quantize(method="rtn"))

    kept = [refused.where for refused in changes.refused if "skips parts of it" in refused.reason]
    assert len(kept) == 8
    assert all(after.weights[key].dtype == torch.float32 for key in kept)
    assert changes.counts()["linear"] >= 4 * 5


def test_a_second_time_nothing_is_left():
    done, _ = apply(one(), EVERYWHERE)
    again, changes = apply(done, EVERYWHERE)

    assert ops(again) == ops(done)
    assert changes.applied == []


def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(x, up, bias)), down)


def read_twice(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    hidden = OPS["swiglu"](F.linear(x, gate), F.linear(x, up, bias))
    return F.linear(hidden, down).sum() + hidden


def shown(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return gated(x, gate, up, down, bias) + up.sum()


def same(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(OPS["swiglu"](F.linear(x, gate), F.linear(x, down)), down)


def squashed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return x + F.linear(OPS["swiglu"](F.linear(x, gate), torch.tanh(F.linear(x, up, bias))), down)


SQUARE = {"gate.weight": torch.ones(WIDTH, WIDTH), "down.weight": torch.ones(WIDTH, WIDTH)}


@pytest.mark.parametrize(
    ("function", "more", "reason"),
    [
        (plain, {}, "the feed-forward part has no gate"),
        (read_twice, {}, "not one linear layer in float32 reads it"),
        (shown, {}, "reads up_weight too"),
        (same, SQUARE, "down_weight would be skipped in two ways"),
        (squashed, {}, "tanh makes it, expected a linear layer in float32"),
    ],
)
def test_refusals(function, more, reason):
    made = one(function, **more)
    done, changes = apply(made, EVERYWHERE)

    assert changes.applied == []
    assert [reason in refused.reason for refused in changes.refused] == [True]
    assert ops(done) == ops(made)


def test_data_and_a_decoding_entry_are_needed():
    made = one()
    with pytest.raises(CompileError, match=r"phase='decode' needs an entry that decodes.*'forward'"):
        SparsifyActivations().requires(made)
    made.calibration = None
    with pytest.raises(CompileError, match="thresholds need calibration data"):
        EVERYWHERE.requires(made)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity is 1.0, expected a number between 0 and 1"),
        ({"sparsity": "half"}, ValueError, "sparsity is 'half'"),
        ({"attention": 1}, TypeError, "attention is 1, expected True or False"),
        ({"phase": "prefill"}, ValueError, "phase is 'prefill'"),
        ({"thresholds": "row"}, ValueError, "thresholds is 'row'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        SparsifyActivations(**options)


def test_text_of_the_pass():
    assert str(SparsifyActivations()) == "sparsify-activations"
    assert str(SparsifyActivations(0.7, phase="all")) == "sparsify-activations(sparsity=0.7, phase='all')"


@pytest.mark.parametrize("name", ["gemma", "phi", "t5-encoder"])
def test_structure_not_names(name):
    """Gated parts of every family are found, with either activation; parts without a gate are refused."""
    case = zoo.case(name)
    made = zoo.traced(case.name).clone()
    made.calibration = Calibration((dict(case.inputs),), ())

    _, changes = apply(made, EVERYWHERE)

    if name == "phi":
        assert changes.applied == []
        assert len(changes.refused) == 4 * len(made.entries)
    else:
        assert changes.counts() == {"ffn": 3 if name == "t5-encoder" else 4}
