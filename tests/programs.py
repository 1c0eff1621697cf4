"""Tiny programs for tests, exported from functions or modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from sylvester.compiler.ledger import Ledger
from sylvester.compiler.program import Binding, Entry, Output, Program
from sylvester.compiler.weights import ParameterStore


class Wrapped(nn.Module):
    """A function over tensors as a module; `weights` are parameters it gets after its inputs."""

    def __init__(self, function: Callable[..., Any], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(weights)
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args, *(getattr(self, name) for name in self.names))


def program(
    function: Callable[..., Any],
    *args: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    axes: Callable[[Tensor], Sequence[int]] = lambda x: range(x.dim() - 1),
) -> Program:
    """The raw export of `function(*args, *weights)`, inputs x0, x1, ...; `axes` of size > 1 are symbolic."""
    model = function if isinstance(function, nn.Module) else Wrapped(function, weights or {})
    dims = tuple({i: Dim.AUTO for i in axes(x) if x.shape[i] > 1} for x in args)
    shapes = dims if isinstance(function, nn.Module) else (dims,)
    exported = torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=False)
    tensors = {**exported.state_dict, **exported.constants}
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(exported.graph, copies))
    for old, new in copies.items():
        new.meta = dict(old.meta)
    kinds = {s.arg.name: s for s in exported.graph_signature.input_specs}
    examples: dict[str, Tensor] = {}
    store = ParameterStore()
    for node in graph.find_nodes(op="placeholder"):
        spec = kinds[node.target]
        if spec.kind == InputKind.USER_INPUT:
            key = f"x{len(examples)}"
            node.meta["bind"] = Binding("input", key)
            examples[key] = args[len(examples)]
        else:
            node.meta["bind"] = Binding("weight", spec.target)
            store[spec.target] = tensors[spec.target]
    results = len(graph.output_node().args[0])
    entry = Entry(graph, [Output("output", f"y{i}") for i in range(results)], examples)
    result = Program(store, {"forward": entry})
    drop_assertions(entry)
    result.sweep()
    return result


def bigram(table: Tensor) -> Program:
    """A language model of ids `x0` that scores the next token by the row of the last one."""
    ids = torch.zeros((2, 5), dtype=torch.int64)
    made = program(F.embedding, ids, weights={"table": table}, axes=lambda x: range(x.dim()))
    made.info |= {"kind": "causal-lm", "notes": []}
    return made


def drop_assertions(entry: Entry) -> None:
    for node in entry.calls():
        if "_assert" in str(node.target):
            entry.graph.erase_node(node)


def ops(program: Program, entry: str = "forward") -> list[str]:
    """Names of the ops of an entry, in order."""
    return [str(n.target).removesuffix(".default") for n in program.entries[entry].calls()]


def reasons(ledger: Ledger) -> list[str]:
    """Every distinct refusal of the last pass."""
    return [reason for _, reason in ledger.rows[-1].refusals()]
