"""Where activations may be zeroed: gated feed-forward parts, and the query and output layers of attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.parts import ATTENTIONS
from sylvester.compiler.program import Entry, Program, binding, is_weight, value
from sylvester.compiler.sparse_ops import sparse_glu, sparse_linear, zero_small

aten, dialect = torch.ops.aten, torch.ops.sylvester
LINEAR = aten.linear.default
SWIGLU, GEGLU = dialect.swiglu.default, dialect.geglu.default
ACTIVATIONS = (aten.gelu.default, aten.relu.default, aten.silu.default)
VIEWS = (
    aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor,
    aten.clone.default, aten.alias.default, aten.to.dtype,
)  # fmt: skip
TURNS = (*VIEWS, dialect.rope.default, dialect.rms_norm.default, aten.layer_norm.default, aten.mul.Tensor)
"""Between a query layer and attention."""
CACHED = (dialect.kv_update.default, dialect.kv_update_q.default)
FFN, QUERY, OUTPUT = "ffn", "query", "attention output"


@dataclass(frozen=True)
class Site:
    """A place in one entry: `reader` skips columns of its weight. In feed-forward parts `gated` makes what it reads."""

    reader: fx.Node
    gated: fx.Node | None = None

    @property
    def up(self) -> fx.Node:
        assert self.gated is not None
        return _node(self.gated.args[1])

    @property
    def activation(self) -> str:
        """Its name in `compiler/sparse_ops.py`."""
        assert self.gated is not None
        if self.gated.target is SWIGLU:
            return "silu"
        return "gelu_tanh" if self.gated.args[2] == "tanh" else "gelu"

    def rewrite(self, entry: Entry, levels: fx.Node, made_by: str) -> None:
        new = self._zeroed(entry, levels, made_by)
        given = arguments(self.reader)
        operands = (new, given["weight"], given["bias"])
        entry.replace(self.reader, entry.emit(sparse_linear.target, *operands, before=self.reader, made_by=made_by))

    def _zeroed(self, entry: Entry, levels: fx.Node, made_by: str) -> fx.Node:
        if self.gated is None:
            x = self.reader.args[0]
            return entry.emit(zero_small.target, x, levels, before=self.reader, made_by=made_by)
        given = arguments(self.up)
        operands = (given["input"], given["weight"], given["bias"], self.gated.args[0], levels, self.activation)
        return entry.emit(sparse_glu.target, *operands, before=self.gated, made_by=made_by)


@dataclass
class Edge:
    """The sites, in every entry, whose layers have the same weights. `levels` are their thresholds."""

    kind: str
    weights: tuple[str, ...]
    sites: list[Site] = field(default_factory=list)
    levels: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def key(self) -> str:
        """The name of the thresholds."""
        return f"{self.weights[-1].removesuffix('.weight')}.thresholds"

    def within(self, entry: Entry) -> list[Site]:
        return [site for site in self.sites if site.reader.graph is entry.graph]


def edges(program: Program, names: Sequence[str], attention: bool, changes: Changes) -> list[Edge]:
    """Those of the main entry that the entries with these names have too; refusals go to `changes`."""
    found: dict[tuple[str, ...], Edge] = {}
    for name, entry in program.entries.items():
        if name not in names and entry is not program.main:
            continue
        for kind, place, site in _sites(program, entry, attention):
            if isinstance(site, Site):
                weights = _weights(site)
                found.setdefault((kind, *weights), Edge(kind, weights)).sites.append(site)
            elif name in names:
                changes.refuse(kind, site, place)
    return [edge for edge in found.values() if _possible(program, edge, names, list(found.values()), changes)]


def _possible(program: Program, edge: Edge, names: Sequence[str], others: Sequence[Edge], changes: Changes) -> bool:
    wanted = [site for name in names for site in edge.within(program.entries[name])]
    twice = [key for other in others if other is not edge for key in other.weights if key in edge.weights]
    if not wanted:
        return False
    if not edge.within(program.main):
        changes.refuse(edge.kind, Refusal("the main entry, which is calibrated on, has no such part", wanted[0].reader))
        return False
    if twice or len(set(edge.weights)) < len(edge.weights):
        reason = f"{(*twice, *edge.weights)[0]} would be skipped in two ways"
        changes.refuse(edge.kind, Refusal(reason, wanted[0].reader))
        return False
    return True


Found = tuple[str, fx.Node, Site | Refusal]


def _sites(program: Program, entry: Entry, attention: bool) -> Iterator[Found]:
    for node in entry.calls(SWIGLU, GEGLU):
        yield FFN, node, _gated(program, node)
    for node in entry.calls(*ACTIVATIONS):
        reader = _only_user(node, LINEAR)
        if reader is not None and _node(node.args[0]).target is LINEAR:
            yield FFN, node, Refusal("the feed-forward part has no gate, its thresholds would be of another kind", node)
    for node in entry.calls(*ATTENTIONS) if attention else ():
        yield QUERY, node, _query(program, node)
        yield OUTPUT, node, _output(program, node)


def _gated(program: Program, node: fx.Node) -> Site | Refusal:
    up, reader = _node(node.args[1]), _only_user(node, LINEAR)
    if reader is None:
        return _unread(node)
    if len(up.users) > 1:
        return Refusal("what the gate multiplies is read elsewhere too", up)
    return _stored(program, up) or _stored(program, reader) or Site(reader, node)


def _query(program: Program, node: fx.Node) -> Site | Refusal:
    layer, *others = (_behind(_node(operand)) for operand in node.args[:3])
    if layer.target is sparse_linear.target:
        return Refusal("its input is zeroed already", layer)
    stored = [arguments(other)["weight"] for other in others if other.target is LINEAR]
    if layer.target is LINEAR and arguments(layer)["weight"] in stored:
        return Refusal("keys or values are made with the weight of the queries", layer)
    return _stored(program, layer) or Site(layer)


def _behind(node: fx.Node) -> fx.Node:
    """What an operand of attention is before views, turns and updates of caches."""
    while node.target in (*TURNS, *CACHED):
        node = _node(node.args[1] if node.target in CACHED else node.args[0])
    return node


def _output(program: Program, node: fx.Node) -> Site | Refusal:
    last = node
    while len(last.users) == 1 and next(iter(last.users)).target in VIEWS:
        last = next(iter(last.users))
    reader = _only_user(last, LINEAR)
    return _unread(last) if reader is None else _stored(program, reader) or Site(reader)


def _unread(node: fx.Node) -> Refusal:
    targets = [user.target for user in node.users]
    if dialect.hadamard.default in targets:
        return Refusal("it is rotated before the layer that reads it, which would fill the zeros", node)
    if sparse_linear.target in targets or zero_small.target in targets:
        return Refusal("it is zeroed already", node)
    return Refusal(f"not one linear layer in float32 reads it, but {[user.name for user in node.users]}", node)


def _stored(program: Program, layer: fx.Node) -> Refusal | None:
    """Why the weight of a layer cannot be skipped in parts."""
    if layer.target is not LINEAR:
        return Refusal(f"%{layer.name} makes it, expected a linear layer in float32", layer)
    given = arguments(layer)
    if not all(is_weight(given[name]) for name in ("weight", "bias") if given[name] is not None):
        return Refusal("a weight of it is computed", layer)
    fact = value(given["weight"])
    if fact.dim() != 2 or fact.dtype != torch.float32:
        return Refusal(f"its weight is {fact.dtype}{list(fact.shape)}, expected a float32 matrix", layer)
    key = binding(given["weight"]).key
    other = next((user for user in program.users(key) if user.target is not LINEAR), None)
    return None if other is None else Refusal(f"%{other.name} reads {key} too", layer)


def _weights(site: Site) -> tuple[str, ...]:
    layers = (site.reader,) if site.gated is None else (site.up, site.reader)
    return tuple(binding(arguments(layer)["weight"]).key for layer in layers)


def _only_user(node: fx.Node, target: Any) -> fx.Node | None:
    users = list(node.users)
    found = len(users) == 1 and users[0].target is target and users[0].args[0] is node
    return users[0] if found else None


def _node(argument: object) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
