"""Programs of many one-op entries, so that a whole table of cases is compiled at once."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from sylvester.compiler.program import Binding, Entry, Output, Program, value
from sylvester.compiler.weights import ParameterStore
from tests.sampling import SIZES, Case, Sample


def program(cases: Iterable[tuple[str, Case]]) -> Program:
    """One entry per named case; weights are keyed `<entry>.<number>`."""
    weights = ParameterStore()
    return Program(weights, {name: entry(name, case, weights) for name, case in cases})


def entry(name: str, case: Case, weights: ParameterStore) -> Entry:
    graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())
    places = [_placeholder(graph, mode, name, *numbered, weights) for numbered in _numbered(case)]
    if not places:  # the fake mode of an entry is found on its nodes
        places = [_placeholder(graph, mode, name, 0, Sample((1,)), torch.zeros(1), weights)]
    result = Entry(graph, [], {})
    end = graph.output([])
    sizes = {
        n: _size(graph, end, node, d)
        for s, node in zip(case.samples, places, strict=False)
        for d, n in enumerate(s.shape)
    }
    rest = iter(places)

    def operand(leaf: Any) -> Any:
        if isinstance(leaf, Sample):
            return next(rest)
        return sizes[leaf] if isinstance(leaf, str) and leaf in SIZES[0] else leaf

    args, kwargs = pytree.tree_map(operand, (case.args, case.kwargs))
    with enable_python_dispatcher():  # as torch.export does: composite ops keep symbolic sizes
        call = result.emit(case.target, *args, before=end, **kwargs)
    found = [call] if isinstance(value(call), Tensor) else [
        result.emit(operator.getitem, call, k, before=end) for k in range(len(value(call)))
    ]  # fmt: skip
    end.args = (tuple(found),)
    result.outputs.extend(Output("output", f"y{k}") for k in range(len(found)))
    result.sweep()
    return result


def _numbered(case: Case) -> list[tuple[int, Sample, Tensor]]:
    return [(k, s, t) for k, (s, t) in enumerate(zip(case.samples, case.tensors(SIZES[0]), strict=True))]


def _placeholder(
    graph: fx.Graph,
    mode: FakeTensorMode,
    name: str,
    number: int,
    sample: Sample,
    tensor: Tensor,
    weights: ParameterStore,
) -> fx.Node:
    node = graph.placeholder(f"x{number}")
    dynamic = [DimDynamic.DUCK if isinstance(n, str) else DimDynamic.STATIC for n in sample.shape]
    node.meta["val"] = mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
    node.meta["bind"] = Binding("weight", f"{name}.{number}") if sample.weight else Binding("input", f"x{number}")
    if sample.weight:
        weights[f"{name}.{number}"] = tensor
    return node


def _size(graph: fx.Graph, end: fx.Node, tensor: fx.Node, dim: int) -> fx.Node:
    with graph.inserting_before(end):
        node = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    node.meta["val"] = value(tensor).shape[dim]
    return node
