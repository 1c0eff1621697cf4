"""Graphs before and after every pass: what observers of a pipeline record, as lines of text, and networkx graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import networkx as nx
from torch import fx

from sylvester.compiler.errors import module_path
from sylvester.compiler.printing import fact, line, op_name, render_entry
from sylvester.compiler.program import Program, binding

Graphs = Mapping[str, tuple[str, ...]]
"""The lines of every entry, by name."""


@dataclass(frozen=True)
class Step:
    """A pass, and the program around it."""

    name: str
    before: Graphs
    after: Graphs

    @property
    def changed(self) -> list[str]:
        """Entries that the pass changed, made or removed."""
        names = dict.fromkeys((*self.before, *self.after))
        return [name for name in names if self.before.get(name) != self.after.get(name)]

    def chunks(self, entry: str, context: int = 2) -> list[list[tuple[str, int, int, int, int]]]:
        """Opcodes of difflib over the lines of an entry, in runs with unchanged lines around them."""
        before, after = self.before.get(entry, ()), self.after.get(entry, ())
        return list(SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(context))


@dataclass
class Recorder:
    """Keeps the program's lines at every seam of a compilation."""

    steps: list[Step] = field(default_factory=list)
    last: Graphs = field(default_factory=dict)

    def begin(self, program: Program) -> None:
        """What a pipeline starts with: what changed since the last step came from outside of passes."""
        found = lines(program)
        if self.last and found != self.last:
            self.steps.append(Step("between passes", self.last, found))
        self.last = found

    def after(self, name: str, program: Program) -> None:
        found = lines(program)
        self.steps.append(Step(name, self.last, found))
        self.last = found


_recorder: ContextVar[Recorder | None] = ContextVar("graphs", default=None)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Within the block every pipeline of this thread is recorded; outside of it nothing is."""
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def recorder() -> Recorder | None:
    """Who records, if anybody does."""
    return _recorder.get()


def lines(program: Program) -> Graphs:
    """One line for the signature of an entry, one for each op, one for what is returned."""
    return {name: tuple(render_entry(name, entry).splitlines()[:-1]) for name, entry in program.entries.items()}


def to_networkx(program: Program) -> nx.MultiDiGraph[str]:
    """Nodes "entry/name" with `entry`, `op`, `fact` and `module`, edges by operand; weights are shared by entries."""
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for entry, node in program.nodes():
        key = _key(entry, node)
        graph.add_node(key, **_attributes(entry, node))
        graph.add_edges_from((_key(entry, operand), key) for operand in node.all_input_nodes)
    return graph


def _key(entry: str, node: fx.Node) -> str:
    bound = binding(node) if node.op == "placeholder" else None
    return f"weight/{bound.key}" if bound and bound.kind == "weight" else f"{entry}/{node.name}"


def _attributes(entry: str, node: fx.Node) -> dict[str, str]:
    if node.op == "placeholder":
        bound = binding(node)
        home = "" if bound.kind == "weight" else entry
        return {"entry": home, "op": bound.kind, "fact": fact(node), "module": bound.key}
    name = "output" if node.op == "output" else op_name(node.target)
    return {"entry": entry, "op": name, "fact": fact(node), "module": module_path(node), "text": line(node)}
