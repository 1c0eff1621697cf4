"""Graphs as data: sources and calls in order; run in PyTorch, made into a Program, printed as Python."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from sylvester.compiler.program import Binding, Entry, Output, Program, value
from sylvester.compiler.weights import ParameterStore
from tests.sampling import SIZES, Sample


@dataclass(frozen=True)
class Ref:
    """The result of a node of the graph."""

    index: int


@dataclass(frozen=True)
class Size:
    """The size of an axis of a node, where a call takes a number."""

    index: int
    axis: int


@dataclass(frozen=True)
class Source:
    """An input or weight; `seed` decides its values."""

    sample: Sample
    seed: int

    def tensor(self, turn: int) -> Tensor:
        """The values in one turn of sizes; weights are those of the first."""
        turn = 0 if self.sample.weight else turn
        return self.sample.tensor(SIZES[turn], torch.Generator().manual_seed(1009 * self.seed + turn))


@dataclass(frozen=True)
class Step:
    """A call whose operands are `Ref` and `Size`."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, results: Sequence[Any]) -> Any:
        args, kwargs = mapped((self.args, self.kwargs), lambda x: _operand(x, results))
        return self.target(*args, **kwargs)

    @property
    def operands(self) -> list[int]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf.index for leaf in leaves if isinstance(leaf, (Ref, Size))]


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    return pytree.tree_map(function, tree)


def _operand(leaf: Any, results: Sequence[Any]) -> Any:
    if isinstance(leaf, Ref):
        return results[leaf.index]
    return results[leaf.index].shape[leaf.axis] if isinstance(leaf, Size) else leaf


@dataclass(frozen=True)
class Graph:
    """Nodes in order, each a source or a call of earlier ones, and which of them are the outputs.

    Sizes "n" and "m" take the values of tests/sampling.py in turn.
    """

    nodes: tuple[Source | Step, ...]
    outputs: tuple[int, ...]

    @property
    def steps(self) -> list[Step]:
        return [node for node in self.nodes if isinstance(node, Step)]

    @property
    def sources(self) -> dict[int, Sample]:
        return {k: node.sample for k, node in enumerate(self.nodes) if isinstance(node, Source)}

    def tensors(self, turn: int) -> dict[int, Tensor]:
        """Values of the sources in one turn of sizes."""
        return {k: node.tensor(turn) for k, node in enumerate(self.nodes) if isinstance(node, Source)}

    def key(self, index: int) -> str:
        """The name of a source in the program."""
        return f"{'w' if self.sources[index].weight else 'x'}{index}"

    def run(self, given: dict[int, Tensor]) -> list[Any]:
        """Every node in plain PyTorch."""
        results: list[Any] = []
        for k, node in enumerate(self.nodes):
            results.append(given[k] if isinstance(node, Source) else node.call(results))
        return results

    def pruned(self) -> Graph:
        """Without the nodes that no output needs."""
        needed = set(self.outputs)
        for k in reversed(range(len(self.nodes))):
            node = self.nodes[k]
            if k in needed and isinstance(node, Step):
                needed.update(node.operands)
        kept = {old: new for new, old in enumerate(sorted(needed))}
        nodes = [_renumbered(self.nodes[k], kept) for k in kept]
        return Graph(tuple(nodes), tuple(kept[k] for k in self.outputs))

    def text(self) -> str:
        """Python that makes this graph, with the names of this module and of tests/sampling.py."""
        nodes = "".join(f"        {_node_text(node)},  # {k}\n" for k, node in enumerate(self.nodes))
        return f"Graph(\n    (\n{nodes}    ),\n    {self.outputs},\n)"


def _renumbered(node: Source | Step, kept: dict[int, int]) -> Source | Step:
    if isinstance(node, Source):
        return node
    move = lambda x: replace(x, index=kept[x.index]) if isinstance(x, (Ref, Size)) else x  # noqa: E731
    args, kwargs = mapped((node.args, node.kwargs), move)
    return Step(node.target, args, kwargs)


def _node_text(node: Source | Step) -> str:
    if isinstance(node, Source):
        return f"Source({_sample_text(node.sample)}, {node.seed})"
    return f"Step({target_text(node.target)}, {_literal(node.args)}, {_literal(node.kwargs)})"


def _sample_text(sample: Sample) -> str:
    """Without what has its usual value."""
    given = [f for f in fields(sample)[1:] if getattr(sample, f.name) != f.default]
    return f"Sample({', '.join([repr(sample.shape), *(f'{f.name}={getattr(sample, f.name)!r}' for f in given)])})"


def _literal(tree: Any) -> str:
    return repr(tree).replace("inf", "math.inf").replace("device(", "torch.device(")


def target_text(target: Any) -> str:
    return "operator.getitem" if target is operator.getitem else f"torch.ops.{target}"


class Model(torch.nn.Module):
    """The graph as a module of its inputs."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        for k, tensor in graph.tensors(0).items():
            if graph.sources[k].weight:
                self.register_buffer(graph.key(k), tensor)
        self.inputs = [k for k, s in graph.sources.items() if not s.weight]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(self.inputs, given, strict=True))
        found |= {k: getattr(self, self.graph.key(k)) for k, s in self.graph.sources.items() if s.weight}
        results = self.graph.run(found)
        return tuple(results[k] for k in self.graph.outputs)


@dataclass(frozen=True)
class Case:
    """A graph as a program of one entry, and the turns of sizes that the guards of its facts allow."""

    graph: Graph
    program: Program
    turns: tuple[int, ...]
    wanted: dict[int, Any] = field(default_factory=dict)
    """What the outputs should be in a turn, once worked out."""

    @cached_property
    def entry(self) -> Entry:
        return self.program.main

    @property
    def settled(self) -> dict[str, str]:
        """Symbolic sizes that were fixed, or found to be equal to others."""
        facts = [f for node in self.entry.graph.nodes if isinstance(f := node.meta.get("val"), FakeTensor)]
        environment = facts[0].fake_mode.shape_env if facts else None
        return {} if environment is None else {str(k): str(v) for k, v in environment.replacements.items()}

    def inputs(self, turn: int) -> dict[str, Tensor]:
        graph = self.graph
        return {graph.key(k): t for k, t in graph.tensors(turn).items() if not graph.sources[k].weight}


def build(graph: Graph) -> Case:
    """The graph op by op, with a fact on every node."""
    environment = ShapeEnv()
    mode, made, weights = FakeTensorMode(shape_env=environment), fx.Graph(), ParameterStore()
    given, nodes, examples = graph.tensors(0), {}, {}
    for k, sample in graph.sources.items():
        nodes[k] = node = made.placeholder(graph.key(k))
        dynamic = [DimDynamic.DUCK if isinstance(n, str) else DimDynamic.STATIC for n in sample.shape]
        node.meta["val"] = mode.from_tensor(given[k], symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        node.meta["bind"] = Binding("weight" if sample.weight else "input", graph.key(k))
        (weights if sample.weight else examples)[graph.key(k)] = given[k]
    entry, end = Entry(made, [], examples), made.output(())
    with enable_python_dispatcher():
        for k, node in enumerate(graph.nodes):
            if isinstance(node, Step):
                nodes[k] = _emit(entry, node, nodes, end)
    end.args = (tuple(nodes[k] for k in graph.outputs),)
    entry.outputs.extend(Output("output", f"y{k}") for k in graph.outputs)
    program = Program(weights, {"forward": entry})
    program.sweep()
    return Case(graph, program, tuple(_turns(environment)))


def _emit(entry: Entry, step: Step, nodes: dict[int, fx.Node], end: fx.Node) -> fx.Node:
    def operand(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return nodes[leaf.index]
        return _size(entry, nodes[leaf.index], leaf.axis, end) if isinstance(leaf, Size) else leaf

    args, kwargs = mapped((step.args, step.kwargs), operand)
    return entry.emit(step.target, *args, before=end, **kwargs)


def _size(entry: Entry, tensor: fx.Node, axis: int, end: fx.Node) -> fx.Node | int:
    size = value(tensor).shape[axis]
    if isinstance(size, int):
        return size
    with entry.graph.inserting_before(end):
        node = entry.graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
    node.meta["val"] = size
    return node


def _turns(environment: ShapeEnv) -> Iterator[int]:
    """The sizes for which everything that was decided while the facts were made holds; the first always."""
    hints = {symbol: int(environment.backed_var_to_val[symbol]) for symbol in environment.backed_var_to_val}
    names = {SIZES[0][name]: name for name in SIZES[0]}
    for turn, sizes in enumerate(SIZES):
        values = {symbol: sizes[names[hint]] for symbol, hint in hints.items() if hint in names}
        held = [guard.expr.subs(values) for guard in environment.guards]
        special = any(symbol in environment.replacements for symbol in values)
        if turn == 0 or (not special and all(bool(h) for h in held)):
            yield turn
