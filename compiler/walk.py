"""The main entry run on all calibration samples at once, from one chosen node to the next.

Alive are the values that a later node still reads, for every sample, and the temporaries of one sample. Weights are
looked up when a node reads them, so that what the caller replaced on the way is not held.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.calibration import Sample
from sylvester.compiler.cost import hint
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program, binding, is_weight

Values = dict[fx.Node, Any]


class Walk:
    """`reach` a stop, read `values` of what feeds it, and `put` what it computes; stops come in graph order.

    The walk computes nothing that no stop needs, and no stop itself.
    """

    def __init__(self, program: Program, samples: Sequence[Sample], stops: Collection[fx.Node]) -> None:
        self.program, self.stops = program, set(stops)
        needed = needed_by(stops)
        self.order = [node for node in program.main.graph.nodes if node in needed and node.op == "call_function"]
        self.dying = _last_reads(self.order)
        self.samples = [self._given(needed, sample) for sample in samples]
        self.at = 0

    def reach(self, stop: fx.Node) -> None:
        """Compute everything before `stop`, one sample after another."""
        end = self.order.index(stop, self.at)
        with torch.no_grad():
            for values in self.samples:
                for node in self.order[self.at : end]:
                    self._run(node, values)
        self.at = end

    def wanted(self, stop: fx.Node) -> bool:
        """Whether a later stop depends on the value of this one."""
        return any(user in self.dying for user in stop.users)

    def values(self, node: fx.Node) -> list[Any]:
        """One value per sample, of a weight always the same."""
        return [self._read(node, values) for values in self.samples]

    def put(self, stop: fx.Node, sample: int, value: Tensor) -> None:
        """The value of the stop that was reached, for one sample; give one to each sample before going on."""
        self.samples[sample][stop] = value

    def _run(self, node: fx.Node, values: Values) -> None:
        if node not in self.stops:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: self._read(n, values))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node not in values and self.wanted(node):
            raise ValueError(f"no value was put for %{node.name}")
        for dead in self.dying[node]:
            values.pop(dead, None)

    def _read(self, node: fx.Node, values: Values) -> Any:
        return self.program.weights[binding(node).key] if is_weight(node) else values[node]

    def _given(self, needed: Collection[fx.Node], sample: Sample) -> Values:
        """Inputs of the sample, and caches without content where attention reads them."""
        found: Values = {}
        for node in self.program.main.placeholders():
            bound = binding(node)
            if node not in needed or bound.kind == "weight":
                continue
            if bound.kind == "input" and bound.key not in sample:
                raise CompileError(f"a calibration sample has no {bound.key!r}", hint=f"it has {sorted(sample)}")
            found[node] = sample[bound.key] if bound.kind == "input" else empty_cache(self.program, bound.key, sample)
        return found


def needed_by(stops: Collection[fx.Node]) -> set[fx.Node]:
    """The stops and all they depend on."""
    found: set[fx.Node] = set()
    pending = list(stops)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _last_reads(order: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> what nothing reads after it."""
    dying: dict[fx.Node, list[fx.Node]] = {node: [] for node in order}
    seen: set[fx.Node] = set()
    for node in reversed(order):
        for read in {*node.all_input_nodes, node}:
            if read not in seen and not is_weight(read):
                seen.add(read)
                dying[node].append(read)
    return dying


def empty_cache(program: Program, key: str, sample: Sample) -> Tensor:
    """Zeros in the shape of a slot, just long enough for the tokens of the sample."""
    slot = program.state[key]
    batch, tokens = next(tuple(t.shape[:2]) for t in sample.values() if t.ndim > 1)
    _, heads, capacity, *rest = (hint(n) for n in slot.shape)
    return torch.zeros((batch, heads, min(tokens, capacity), *rest), dtype=slot.dtype)
