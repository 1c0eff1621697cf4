"""The first node of an entry whose value in the ONNX graph is another: every value is an output of a copy."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx import parity
from sylvester.backends.onnx.graph import described, numpy_of
from sylvester.backends.onnx.names import past_name
from sylvester.backends.onnx.runtime import Graphs, open_session
from sylvester.backends.onnx.weights import FILE
from sylvester.backends.signature import shape_text
from sylvester.compiler.check import relative_error
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Entry, Program, binding, value


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph), garbage_collect_values=False)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.kept[n.name] = super().run_node(n)
        return self.kept[n.name]


def first_difference(program: Program, graphs: Graphs, worst: parity.Agreement, made: Any) -> fx.Node | None:
    """Of the entry and inputs of `worst`; None where no value alone explains it. `made` is the model and its values."""
    model, values = made
    entry = program.entries[worst.entry]
    inputs = dict(parity.inputs_of(entry))[worst.data]
    state = parity.states(program, graphs, worst.entry, inputs)
    expected = _expected(program, entry, inputs, parity.tensors(program, state))
    nodes = [n for n in parity.nodes_of(entry) if _visible(model.graph, values.get(n))]
    given = {k: numpy_of(t) for k, t in inputs.items()}
    given |= {past_name(key): array for key, array in (state.arrays if state else {}).items()}
    found = _run(graphs, worst.entry, model, [values[n] for n in nodes], nodes, given)
    for node in nodes:
        if node.name in found and not relative_error(expected[node.name], found[node.name]) <= worst.tolerance:
            return node
    return None


def _expected(program: Program, entry: Entry, inputs: parity.Values, state: parity.Values) -> dict[str, Any]:
    sources: dict[str, Any] = {"input": inputs, "weight": program.weights, "state": state}
    arguments = [sources[binding(n).kind][binding(n).key] for n in entry.placeholders()]
    recorder = _Recorder(entry.graph)
    with torch.no_grad():
        recorder.run(*arguments)
    return recorder.kept


def _visible(graph: ir.Graph, made: Any) -> bool:
    """Whether a value is one of the graph itself, not of a branch in it."""
    producer = made.producer() if isinstance(made, ir.Value) else None
    return producer is not None and producer.graph is graph


def _run(
    graphs: Graphs, name: str, model: ir.Model, values: list[ir.Value], nodes: list[fx.Node], given: dict[str, Any]
) -> dict[str, Tensor]:
    """The values by the names of their nodes."""
    for made, node in zip(values, nodes, strict=True):
        fact: Tensor = value(node)
        if made not in model.graph.outputs:
            described(made, fact.dtype, shape_text(fact.shape))
            model.graph.outputs.append(made)
    with TemporaryDirectory(dir=graphs.folder) as folder:
        path = Path(folder) / "probe.onnx"
        (Path(folder) / FILE).symlink_to(graphs.folder / FILE)
        path.write_bytes(ir.to_proto(model).SerializeToString())
        session = open_session(path, graphs.threads, graphs.properties[name].accuracy_level)
        known = {i.name for i in session.get_inputs()}
        try:
            found = session.run([v.name for v in values], {k: a for k, a in given.items() if k in known})
        except Exception as error:
            raise CompileError(f"onnxruntime cannot run graph {name!r}: {error}") from error
    return {node.name: torch.from_numpy(a) for node, a in zip(nodes, found, strict=True)}
