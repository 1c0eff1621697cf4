"""The main entry run on a sample, with the values of chosen nodes kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from sylvester.compiler.calibration import Sample
from sylvester.compiler.next_token import empty_state
from sylvester.compiler.program import Program, binding


class _Keeper(fx.Interpreter):
    """Runs a graph and keeps what some nodes compute."""

    def __init__(self, graph: fx.Graph, wanted: Collection[fx.Node]) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph), garbage_collect_values=True)
        self.wanted = {node.name for node in wanted}
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = result
        return result


def observe(program: Program, sample: Sample, wanted: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """The value of each wanted node of the main entry, with caches without content."""
    entry = program.main
    sources: dict[str, Any] = {
        "input": sample,
        "weight": program.weights,
        "state": empty_state(program, entry, sample),
    }
    arguments = [sources[binding(n).kind][binding(n).key] for n in entry.placeholders()]
    keeper = _Keeper(entry.graph, wanted)
    with torch.no_grad():
        keeper.run(*arguments)
    return {node: keeper.kept[node.name] for node in wanted}
