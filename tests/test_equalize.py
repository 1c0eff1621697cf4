"""Cross-layer equalisation: channels get even weights on both sides, exactly, also in caches and with grouped heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sylvester as sv
from benchmarks.quality.injection import inject
from sylvester.compiler.pipeline import Pipeline
from sylvester.passes.equalize import Equalize
from sylvester.passes.split_linears import SplitLinears
from tests import zoo


class Feed(nn.Module):
    """up -> relu -> down, or with a gate."""

    def __init__(self, gated=False, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(6, 10) if gated else None
        self.up, self.down = nn.Linear(6, 10, bias=bias), nn.Linear(10, 7)

    def forward(self, x):
        h = self.up(x)
        h = torch.relu(h) if self.gate is None else nn.functional.silu(self.gate(x)) * h
        return self.down(h)


def run(program):
    program, ledger = Pipeline((Equalize(),)).run(program)
    return program, ledger.rows[0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_columns_of_a_channel_get_one_norm(gated, bias):
    model = Feed(gated, bias)
    with torch.no_grad():
        model.up.weight[2] *= 30
        model.down.weight[:, 2] /= 30
    program, row = run(sv.trace(model, (torch.randn(3, 6),)))
    assert row.changes.counts() == {"ffn": 1}
    assert row.error < 1e-6
    rows, columns = program.weights["up.weight"].norm(dim=1), program.weights["down.weight"].norm(dim=0)
    torch.testing.assert_close(rows, columns)


def test_a_dead_channel_stays_finite():
    model = Feed()
    with torch.no_grad():
        model.up.weight[1] = 0
        model.down.weight[:, 1] = 0
        model.down.weight[:, 2] = 0
    program, row = run(sv.trace(model, (torch.randn(3, 6),)))
    assert all(tensor.isfinite().all() for tensor in program.weights.values())
    assert row.error < 1e-6


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt-neox", "opt", "bert", "t5", "odd-names"])
def test_it_is_exact_on_the_zoo_with_caches(name):
    case = zoo.case(name)
    _, ledger = Pipeline((SplitLinears(), Equalize())).run(sv.trace(case.model, case.inputs))
    assert ledger.rows[1].error < 1e-5
    assert ledger.rows[1].changes.counts()["values"] >= case.blocks


class Twice(nn.Module):
    """The hidden value is also an output, or the layer is used twice."""

    def __init__(self, output):
        super().__init__()
        self.output, self.up, self.down = output, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = torch.relu(self.up(x))
        return (self.down(h), h) if self.output else self.down(torch.relu(self.up(h)))


def test_a_hidden_value_with_other_readers_is_left_alone():
    _, row = run(sv.trace(Twice(True), (torch.randn(3, 6),)))
    assert not row.changes.applied


def test_a_weight_that_is_read_elsewhere_too_is_refused():
    _, row = run(sv.trace(Twice(False), (torch.randn(3, 6),)))
    assert not row.changes.applied
    assert row.error in (None, 0.0)
    assert {r.reason for r in row.changes.refused} <= {
        "up.weight is read elsewhere too",
        "more than one layer makes the channels",
    }


def test_a_gelu_does_not_only_scale():
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7))
    _, row = run(sv.trace(model, (torch.randn(3, 6),)))
    assert not row.changes.applied


def test_outliers_injected_by_rows_are_taken_out():
    case = zoo.case("llama-gqa")
    model = copy.deepcopy(case.model)
    inject(model, 30.0, channels=2)
    torch.testing.assert_close(model(**case.inputs).logits, case.model(**case.inputs).logits, rtol=1e-3, atol=1e-4)
    program, _ = run(sv.trace(model, case.inputs))
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        norms = program.weights[f"model.layers.0.{name}.weight"].norm(dim=1)
        assert norms.max() / norms.median() < 5
