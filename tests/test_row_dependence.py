"""Whether a row of a batch depends on itself alone, and that passes which break it are flagged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import sylvester as sv
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Contract, Pass, Pipeline
from sylvester.compiler.row_dependence import batch_symbol, dependence, dependences
from tests import zoo
from tests.nightly import by_night

KNOWN = ["llama-gqa", "gpt2", "phi", "t5", "vit", "resnet", "mlp"]


class Alone(nn.Module):
    def forward(self, x):
        return (x.reshape(-1, 4) * 2).reshape(x.shape).softmax(-1)


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Swapped(nn.Module):
    def forward(self, x):
        return x.flip(0)


class Merged(nn.Module):
    """The batch ends up inside another axis."""

    def forward(self, x):
        return x.transpose(0, 1).reshape(-1, 4).softmax(0)


def traced(model):
    return sv.trace(model.eval(), (torch.randn(3, 5, 4),))


@pytest.mark.parametrize("name", by_night(KNOWN, ["llama-gqa", "t5", "vit", "mlp"]))
def test_rows_of_models_are_alone(name):
    case = zoo.case(name)
    program = sv.trace(case.model, case.inputs)

    assert batch_symbol(program.main) is not None
    assert dependences(program) == {}


@pytest.mark.parametrize(("model", "reason"), [(Mean(), "pairs"), (Swapped(), "not known"), (Merged(), "mixes")])
def test_ops_that_pair_rows_are_found(model, reason):
    found = dependence(traced(model).main)

    assert reason in found.reason
    assert "rows" in found.reason
    assert found.at is not None


def test_rows_that_stay_apart_do():
    assert dependence(traced(Alone()).main) is None


def test_a_program_without_a_batch_has_no_rows():
    program = sv.trace(Mean(), (torch.randn(3, 4),), dynamic={"x": {}})

    assert batch_symbol(program.main) is None
    assert dependences(program) == {}


@dataclass(frozen=True)
class Centre(Pass):
    """Takes the mean over the batch off the output."""

    name: ClassVar[str] = "centre"
    contract: ClassVar[Contract] = "lossy"

    def run(self, program):
        (result,) = program.main.results()
        end = program.main.graph.output_node()
        mean = program.main.emit(torch.ops.aten.mean.dim, result, [0], True, before=end)
        end.args = ((program.main.emit(torch.ops.aten.sub.Tensor, result, mean, before=end),),)
        return Changes()


def test_a_pass_that_lets_rows_depend_on_each_other_is_flagged_once():
    _, ledger = Pipeline((Centre(), Centre())).run(traced(Alone()))
    notes = [row.changes.notes for row in ledger.rows]

    assert len(notes[0]) == 1
    assert "a row of a batch may depend on other rows in 'forward'" in notes[0][0]
    assert notes[1] == []
