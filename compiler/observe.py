"""The main entry run on a sample, with a look at the values of chosen nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from sylvester.compiler.calibration import Sample
from sylvester.compiler.next_token import empty_state
from sylvester.compiler.program import Program, binding

See = Callable[[fx.Node, tuple[Any, ...], Any], None]
"""Gets a node, the values of its positional arguments and its result."""


class _Watcher(fx.Interpreter):
    """Runs a graph and shows what some nodes compute, and from what."""

    def __init__(self, graph: fx.Graph, wanted: Collection[fx.Node], see: See) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph), garbage_collect_values=True)
        self.wanted = {node.name: node for node in wanted}
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.see(self.wanted[n.name], self.fetch_args_kwargs_from_env(n)[0], result)
        return result


def watch(program: Program, sample: Sample, wanted: Collection[fx.Node], see: See) -> None:
    """Run the main entry, with caches without content; `see` gets each wanted node as it is computed."""
    entry = program.main
    sources: dict[str, Any] = {
        "input": sample,
        "weight": program.weights,
        "state": empty_state(program, entry, sample),
    }
    arguments = [sources[binding(n).kind][binding(n).key] for n in entry.placeholders()]
    with torch.no_grad():
        _Watcher(entry.graph, wanted, see).run(*arguments)


def observe(program: Program, sample: Sample, wanted: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """The value of each wanted node of the main entry, with caches without content."""
    kept: dict[fx.Node, Any] = {}
    watch(program, sample, wanted, lambda node, _, result: kept.update({node: result}))
    return {node: kept[node] for node in wanted}
