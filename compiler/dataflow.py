"""The dataflow of an entry: what depends on input content, the spine all of it passes, the segments between."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from sylvester.compiler.cache_ops import kv_update_q
from sylvester.compiler.program import Entry, binding, is_weight, value
from sylvester.compiler.quantized_ops import WIDENINGS


@dataclass(frozen=True)
class Segment:
    """What lies between two neighbouring spine values, `end` included.

    `nodes` also has what only this segment uses, such as keys of another stream. Segments of equal structure have equal
    digests, whatever their weights; then `parameters` and `sides` (values from outside) correspond one to one.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...]
    digest: str


class Dataflow:
    """The values of one entry that depend on the content of inputs, not only on their sizes."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.order = {node: i for i, node in enumerate(entry.graph.nodes)}
        self.content = _content(entry)
        self.floats: nx.DiGraph[fx.Node] = nx.DiGraph()
        for node in self.content:
            if _is_float(node):
                self.floats.add_node(node)
                operands = [u for u in node.all_input_nodes if u in self.content and _is_float(u)]
                self.floats.add_edges_from((u, node) for u in operands)
        self._segments: dict[tuple[fx.Node, fx.Node], Segment] = {}

    def sources(self) -> list[fx.Node]:
        """Where float content begins: float inputs, and embeddings or projections of others, in order."""
        first = [n for n in self.floats if self.floats.in_degree(n) == 0]
        return [n for n in first if n.op == "placeholder" or any(_is_stored(u) for u in n.all_input_nodes)]

    def spine(self, source: fx.Node) -> list[fx.Node]:
        """The values that every path from `source` to the last result it reaches goes through."""
        reached = nx.descendants(self.floats, source) | {source}
        results = [r for r in self.entry.results() if r in reached]
        if not results:
            return [source]
        last = max(results, key=self.order.__getitem__)
        flow = self.floats.subgraph(reached & (nx.ancestors(self.floats, last) | {last}))
        after = nx.immediate_dominators(flow.reverse(copy=False), last)
        chain = [source]
        while chain[-1] is not last:
            chain.append(after[chain[-1]])
        return chain

    def segments(self, source: fx.Node) -> list[Segment]:
        """The segments along the spine of `source`."""
        chain = self.spine(source)
        return [self.segment(a, b) for a, b in pairwise(chain)]

    def segment(self, start: fx.Node, end: fx.Node) -> Segment:
        """The segment between two neighbours of a spine."""
        if (start, end) not in self._segments:
            inside = self.between(start, end)
            nodes = [n for n in walk(end, self._with_private(inside, start)) if n is not start]
            digest, parameters, sides = fingerprint(start, nodes)
            self._segments[start, end] = Segment(start, end, tuple(nodes), parameters, sides, digest)
        return self._segments[start, end]

    def between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """What `start` reaches before `end`, with `end`, of what `end` needs."""
        forward, stack = {end}, [start]
        while stack:
            for node in self.floats.successors(stack.pop()):
                if node not in forward and self.order[node] < self.order[end]:
                    forward.add(node)
                    stack.append(node)
        return {n for n in walk(end, forward) if n in forward}

    def _with_private(self, inside: set[fx.Node], start: fx.Node) -> set[fx.Node]:
        """`inside` and the calls, outside of it, whose every user is in it."""
        private = set(inside)
        waiting = [u for n in inside for u in n.all_input_nodes]
        while waiting:
            node = waiting.pop()
            tensor = node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, tuple, list))
            if tensor and node not in private and node is not start and all(u in private for u in node.users):
                private.add(node)
                waiting += node.all_input_nodes
        return private


def _is_stored(node: fx.Node) -> bool:
    """A weight, also one that is widened where it is read."""
    return is_weight(node) or node.target in WIDENINGS


def walk(end: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """The nodes of `inside` that `end` needs, operands before users, in the order the arguments name them."""
    done: dict[fx.Node, None] = {}
    stack = [(end, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            done[node] = None
        elif node not in done and node in inside:
            stack.append((node, True))
            stack += [(u, False) for u in reversed(node.all_input_nodes) if u not in done]
    return list(done)


def fingerprint(start: fx.Node, nodes: Iterable[fx.Node]) -> tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """A digest of the term that `nodes` compute from `start`, with the weights and outside values in order of use."""
    names: dict[fx.Node, str] = {start: "in"}
    parameters: list[fx.Node] = []
    sides: list[fx.Node] = []
    digest = hashlib.blake2b(digest_size=8)
    for i, node in enumerate(nodes):
        for leaf in node.all_input_nodes:
            if leaf not in names:
                names[leaf] = _leaf(leaf, parameters, sides)
        digest.update(f"{node.target}{_text((node.args, node.kwargs), names)};".encode())
        names[node] = f"n{i}"
    return digest.hexdigest(), tuple(parameters), tuple(sides)


def _leaf(node: fx.Node, parameters: list[fx.Node], sides: list[fx.Node]) -> str:
    fact = value(node)
    if not isinstance(fact, Tensor):
        return str(fact)
    if is_weight(node):
        parameters.append(node)
        return f"weight{len(parameters)}:{tuple(fact.shape)}{fact.dtype}"
    sides.append(node)
    return f"side{len(sides)}:{fact.dim()}{fact.dtype}"


def _text(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, (list, tuple)):
        return f"[{','.join(_text(a, names) for a in argument)}]"
    if isinstance(argument, Mapping):
        return ",".join(f"{k}={_text(v, names)}" for k, v in sorted(argument.items()))
    return repr(argument)


def _content(entry: Entry) -> dict[fx.Node, None]:
    """Tensors that depend on what inputs or states hold; sizes do not."""
    found: dict[fx.Node, None] = {}
    for node in entry.graph.nodes:
        fact = node.meta.get("val")
        if node.op == "placeholder":
            given = binding(node).kind != "weight" and isinstance(fact, Tensor)
        else:
            given = node.op == "call_function" and not isinstance(fact, (int, float, torch.SymInt))
            given = given and any(u in found for u in node.all_input_nodes)
        if given:
            found[node] = None
    return found


def _is_float(node: fx.Node) -> bool:
    """Whether a node has float values; the records of a quantised cache stand for some."""
    if node.target is kv_update_q.target:
        return True
    fact = node.meta.get("val")
    first = fact[0] if isinstance(fact, (tuple, list)) and fact else fact
    return isinstance(first, Tensor) and first.is_floating_point()


def reached(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that depends on them."""
    stack = list(nodes)
    found = set(stack)
    while stack:
        new = [user for user in stack.pop().users if user not in found]
        found |= set(new)
        stack += new
    return found
