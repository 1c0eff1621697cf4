"""Which linear layers run as one: those that read the same tensor, such as query, key and value, or gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sylvester.codegen.branches import branches
from sylvester.codegen.layout import F32, Format, FormatName
from sylvester.codegen.quantized import group_of
from sylvester.compiler import quantized_ops, sparse_ops  # noqa: F401  (register the ops below)
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

aten, dialect = torch.ops.aten, torch.ops.sylvester
LINEARS: Mapping[Any, str] = {
    aten.linear.default: "f32",
    dialect.linear_bf16.default: "bf16",
    dialect.linear_w8.default: "q8",
    dialect.linear_w4.default: "q4",
    dialect.linear_w3.default: "q3",
}
GATES = (dialect.swiglu.default, dialect.geglu.default)
WIDENINGS = (
    dialect.dequantize_w8.default,
    dialect.dequantize_w4.default,
    dialect.dequantize_w3.default,
    dialect.widen_bf16.default,
)
"""Ops that read a weight out of the panels of a low-bit linear layer."""
SKIPPING: Mapping[Any, FormatName] = {dialect.sparse_glu.default: "rows", dialect.sparse_linear.default: "columns"}
"""Ops that read parts of a weight only, and how it must be stored for that; every layer reads that one copy."""


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers over one input, computed by one kernel. Interleaved: two whose results a gate multiplies."""

    nodes: tuple[fx.Node, ...]
    format: Format
    interleaved: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(binding(weight_of(n)).key for n in self.nodes)

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(binding(n.args[2]).key for n in self.nodes) if self.format.quantised else ()  # type: ignore[arg-type]

    @property
    def step(self) -> str | None:
        """The stored scale of the rows, the same of all layers."""
        return step_of(self.nodes[0])


Groups = dict[fx.Node, LinearGroup]


def linear_groups(program: Program) -> dict[str, Groups]:
    """Per entry, the group of every linear layer with stored weights.

    A weight is stored once, so layers are only joined when every use of each of their weights is in an equal group.
    """
    strided = strided_weights(program)
    found = {name: _candidates(entry, strided) for name, entry in program.entries.items()}
    low_bit = {key for groups in found.values() for g in groups if not g.format.floats for key in g.weights}
    uses: dict[str, set[Any]] = defaultdict(set)
    for entry_name, entry in program.entries.items():
        members = {node: group for group in found[entry_name] for node in group.nodes}
        for weight in entry.placeholders("weight"):
            for user in weight.users:
                if binding(weight).key in low_bit and user.target not in (*LINEARS, *WIDENINGS):
                    _refuse_reader(weight, user)
                group = members.get(user)
                uses[binding(weight).key].add((group.weights, group.interleaved) if group else user.name)
    return {name: _settled(groups, uses) for name, groups in found.items()}


def _refuse_reader(weight: fx.Node, reader: fx.Node) -> None:
    raise Unsupported(
        f"only linear layers of its format read a low-bit weight, found %{reader.name} over %{weight.name}",
        at=reader,
        hint="store a copy of the weight under another name",
    )


def weight_of(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias argument; its place follows the scales, where there are any."""
    bias = _argument(node, "bias")
    return bias if isinstance(bias, fx.Node) else None


def step_of(node: fx.Node) -> str | None:
    """The stored scale of the rows of a quantised layer, or None for one that each row makes."""
    step = _argument(node, "step")
    return binding(step).key if isinstance(step, fx.Node) else None


def _argument(node: fx.Node, name: str) -> Any:
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]
    return node.kwargs.get(name, given.get(name))


def strided_weights(program: Program) -> dict[str, FormatName]:
    """Float32 weights that are not stored in panels, because a kernel skips rows of them."""
    found: dict[str, FormatName] = {}
    for entry in program.entries.values():
        for node in entry.calls(*SKIPPING):
            if is_weight(weight_of(node)) and value(weight_of(node)).dim() == 2:
                found.setdefault(binding(weight_of(node)).key, SKIPPING[node.target])
    return found


def _candidates(entry: Entry, strided: Mapping[str, FormatName]) -> list[LinearGroup]:
    """Stored-weight layers grouped by input, format and the scale of the rows; strided ones stand alone."""
    by_input: dict[Any, list[fx.Node]] = defaultdict(list)
    branch_of = branches(entry)
    for node in entry.calls(*LINEARS):
        if is_stored(node):
            key = binding(weight_of(node)).key
            form = Format(strided[key]) if key in strided else format_of(node)
            alone = key if key in strided else ""
            by_input[node.args[0], form, step_of(node), branch_of.get(node), alone].append(node)
    return [part for (_, form, *_), nodes in by_input.items() for part in _split_gates(nodes, form)]


def is_stored(node: fx.Node) -> bool:
    """Whether all parameters of a linear layer are stored: a weight with two axes, and a bias of all its rows."""
    parameters = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
    if not parameters or not all(is_weight(p) for p in parameters):
        return False
    rows, bias, step = value(weight_of(node)).shape, bias_of(node), _argument(node, "step")
    whole = bias is None or value(bias).shape == rows[:1]
    return len(rows) == 2 and whole and (step is None or value(step).shape == (1,))


def format_of(node: fx.Node) -> Format:
    name = LINEARS[node.target]
    if name == "f32":
        return F32
    if name == "bf16":
        return Format("bf16")
    scales, x = value(node.args[2]), value(node.args[0])  # type: ignore[arg-type]
    group = group_of(int(x.shape[-1]), int(scales.shape[1]), whole=name == "q8")
    bits = _argument(node, "bits")
    return Format(name, group, 8 if bits is None else bits, step_of(node) is not None)  # type: ignore[arg-type]


def _split_gates(nodes: list[fx.Node], form: Format) -> list[LinearGroup]:
    """Pairs that one gate reads are interleaved, the others stand side by side."""
    pairs = []
    for node in nodes:
        users = list(node.users)
        partner = [n for n in nodes if n is not node and list(n.users) == users]
        if len(users) == 1 and users[0].target in GATES and len(partner) == 1 and users[0].args[0] is node:
            pairs.append((node, partner[0]))
    paired = {n for pair in pairs for n in pair}
    rest = tuple(n for n in nodes if n not in paired)
    gates = [LinearGroup(pair, form, interleaved=True) for pair in pairs if _alike(pair)]
    gates += [LinearGroup((n,), form) for pair in pairs if not _alike(pair) for n in pair]
    return [*gates, *([LinearGroup(rest, form)] if rest else [])]


def _alike(pair: tuple[fx.Node, fx.Node]) -> bool:
    return weight_of(pair[0]) is not weight_of(pair[1]) and (
        value(weight_of(pair[0])).shape[0] == value(weight_of(pair[1])).shape[0]
    )


def _settled(groups: list[LinearGroup], uses: Mapping[str, set[Any]]) -> Groups:
    settled: Groups = {}
    for group in groups:
        distinct = len(set(group.weights)) == len(group.nodes)
        joint = distinct and all(uses[key] == {(group.weights, group.interleaved)} for key in group.weights)
        for node in group.nodes:
            settled[node] = group if joint or len(group.nodes) == 1 else LinearGroup((node,), group.format)
    return settled
