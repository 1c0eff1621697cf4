"""Programs and eager references for passes that leave out layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sylvester.compiler.next_token import run
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from tests import zoo


def traced(name: str) -> Program:
    return zoo.traced(name)


def rewritten(name: str, *steps: Pass) -> Program:
    return Pipeline(steps)(traced(name))


def ids(length: int = 9, batch: int = 2) -> Tensor:
    return torch.randint(3, zoo.VOCAB, (batch, length))


def decoded(program: Program, tokens: Tensor) -> Tensor:
    """Scores of a teacher-forced reading through `decode`."""
    name = next(iter(program.entries["prefill"].examples))
    results = run(program, {name: tokens})
    return results.get("logits", next(iter(results.values())))


def with_layers(name: str, kept: list[int], tokens: Tensor) -> Tensor:
    """Scores of the model of the zoo with only some of its layers, run eagerly."""
    case = zoo.case(name)
    model = copy.deepcopy(case.model)
    for module in model.modules():
        for key, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList) and len(child) == case.blocks:
                setattr(module, key, nn.ModuleList([child[n] for n in kept]))
    if hasattr(model, "config"):
        model.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        return zoo.tensors(model(**{next(iter(case.inputs)): tokens}))[0]
