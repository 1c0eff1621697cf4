"""Every rule proves itself: its pattern matches each spelling of `before`, and both sides agree; none is named."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor, fx

import sylvester.passes
from sylvester.compiler.match import Match, Matcher
from sylvester.compiler.ops import sample
from sylvester.compiler.pattern import pattern_of
from sylvester.compiler.rewrite import Rule
from tests.spellings import spellings

for module in pkgutil.iter_modules(sylvester.passes.__path__):
    importlib.import_module(f"sylvester.passes.{module.name}")
RULES = [rule for rule in Rule.__subclasses__() if rule.__module__.startswith("sylvester.passes")]


def tensors(rule: type[Rule]) -> list[Tensor]:
    return [x for x in sample(rule.example) if isinstance(x, Tensor)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_spelling_matches_and_both_sides_agree(rule: type[Rule]) -> None:
    for graph in spellings(rule):
        inputs = dict(zip(graph.find_nodes(op="placeholder"), tensors(rule), strict=True))
        before = fx.GraphModule(torch.nn.Module(), graph)(*inputs.values())
        (root,) = graph.output_node().all_input_nodes

        match = Matcher(pattern_of(rule), rule.transparent).match(root)

        assert isinstance(match, Match), f"{match}\n{graph}"
        bound = {name: inputs[x] if isinstance(x, fx.Node) else x for name, x in match.bound.items()}
        torch.testing.assert_close(rule.after(**bound), before)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_rule_matches_a_lone_call(rule: type[Rule]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.relu.default, (x,))

    assert not isinstance(Matcher(pattern_of(rule), rule.transparent).match(node), Match)
