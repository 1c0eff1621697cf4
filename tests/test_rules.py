"""Every rule proves itself: both sides agree on its example, in every spelling. No rule is named here."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import sylvester.passes
from sylvester.compiler.ops import sample
from sylvester.compiler.pattern import EITHER, pattern_of, trace
from sylvester.compiler.rewrite import Rule

for module in pkgutil.iter_modules(sylvester.passes.__path__):
    importlib.import_module(f"sylvester.passes.{module.name}")
RULES = [rule for rule in Rule.__subclasses__() if rule.__module__.startswith("sylvester.passes")]


class Spelling(fx.Interpreter):
    """Runs a traced `before` with one form chosen at each `either`."""

    def __init__(self, graph: fx.Graph, choice: dict[fx.Node, int]) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.choice = {node.name: n for node, n in choice.items()}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not EITHER:
            return super().run_node(n)
        return self.env[n.args[0][self.choice[n.name]]]


def spellings(rule: type[Rule]) -> Iterator[tuple[Tensor, set[str]]]:
    """The value of `before` in each spelling, with the tensor parameters that occur in it."""
    args = sample(rule.example)
    graph = trace(rule.before, rule.example)
    tensors = [x for x in args if isinstance(x, Tensor)]
    names = [name for name, x in zip(pattern_of(rule).names, args, strict=True) if isinstance(x, Tensor)]
    placeholders = dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))
    choices = [n for n in graph.nodes if n.target is EITHER]
    for picks in itertools.product(*(range(len(n.args[0])) for n in choices)):
        choice = dict(zip(choices, picks, strict=True))
        yield Spelling(graph, choice).run(*tensors), reached(graph.output_node(), choice, placeholders)


def reached(node: fx.Node, choice: dict[fx.Node, int], placeholders: dict[fx.Node, str]) -> set[str]:
    if node in placeholders:
        return {placeholders[node]}
    inputs = [node.args[0][choice[node]]] if node in choice else node.all_input_nodes
    return {name for n in inputs for name in reached(n, choice, placeholders)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_both_sides_agree(rule: type[Rule]) -> None:
    args = dict(zip(pattern_of(rule).names, sample(rule.example), strict=True))

    for before, present in spellings(rule):
        given = {name: x if name in present or not isinstance(x, Tensor) else None for name, x in args.items()}
        torch.testing.assert_close(rule.after(**given), before)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_matches_its_own_before(rule: type[Rule]) -> None:
    assert pattern_of(rule).targets()
    assert pattern_of(rule).size > 0
