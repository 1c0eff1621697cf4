"""The forms that the left side of a rule has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import fx

from sylvester.compiler.pattern import EITHER, trace
from sylvester.compiler.rewrite import Rule


def spellings(rule: type[Rule]) -> Iterator[fx.Graph]:
    """`before` as one graph for each way to choose among its `either` forms."""
    traced = trace(rule.before, rule.example)
    choices = [n for n in traced.nodes if n.target is EITHER]
    for picks in itertools.product(*(range(len(n.args[0])) for n in choices)):
        graph, copies = fx.Graph(), {}
        for node in traced.nodes:
            if node.target is EITHER:
                copies[node] = copies[node.args[0][picks[choices.index(node)]]]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.eliminate_dead_code()
        yield graph
