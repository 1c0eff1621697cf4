"""x W^T + b -> halo_linear(x, W, b) in a Program that trains, but for its head and what the caller leaves out."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.dataflow import reached
from sylvester.compiler.halo_ops import HALO_LINEAR
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

aten = torch.ops.aten
MADE_BY = "halo"
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
OTHERS = (
    aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten.bilinear.default, aten.conv1d.default,
    aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
)  # fmt: skip
"""Products with weights that stay as they are."""
THROUGH = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "slice", "select",
    "squeeze", "unsqueeze", "to", "contiguous", "clone", "split", "split_with_sizes", "chunk", "getitem", "index",
    "gather", "index_select", "softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "mul", "div", "add",
    "sub", "mean", "sum", "pad", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "binary_cross_entropy_with_logits",
    "mse_loss",
})  # fmt: skip
"""What may follow the last linear of a classifier; `tanh` as well for a language model, which may cap its scores."""


@dataclass(frozen=True)
class Linear:
    """One call: x [..., in] times a weight [out, in], or [in, out] where it is `turned`."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    turned: bool
    key: str

    @property
    def name(self) -> str:
        return self.key.removesuffix(".weight")


@dataclass(frozen=True)
class Plan:
    """The linears to rewrite, and why other products with weights stay as they are."""

    chosen: tuple[Linear, ...]
    kept: dict[str, str]


def plan(program: Program, skip: tuple[str, ...], head: bool) -> Plan:
    """`skip`: patterns of names of weights."""
    entry, names = program.main, _names(program)
    data = reached(entry.placeholders("input"))
    found = {linear.node: linear for linear in _linears(entry, data)}
    last = set() if head else heads(program, set(found), data)
    chosen, kept = [], {}
    for node, linear in found.items():
        pattern = next((p for p in skip for name in names[linear.key] if fnmatchcase(name, p)), None)
        if pattern is not None:
            kept[linear.key] = f"left out by {pattern!r}"
        elif node in last:
            kept[linear.key] = "it is the head: head=True rewrites it as well"
        elif not value(linear.weight).is_floating_point():
            kept[linear.key] = f"its weight is {value(linear.weight).dtype}"
        else:
            chosen.append(linear)
    return Plan(tuple(chosen), kept | _others(entry, set(found), data))


def unmatched(program: Program, skip: tuple[str, ...]) -> list[str]:
    """Patterns that no weight has."""
    everything = [name for names in _names(program).values() for name in names]
    return [p for p in skip if not any(fnmatchcase(name, p) for name in everything)]


def _names(program: Program) -> dict[str, list[str]]:
    """Key -> all its names: tied weights have several."""
    names = {key: [key] for key in program.weights}
    for alias, key in program.weights.aliases.items():
        names.setdefault(key, [key]).append(alias)
    return names


def _linears(entry: Entry, data: set[fx.Node]) -> Iterator[Linear]:
    for node in entry.calls(*PRODUCTS):
        x: Any
        weight: Any
        bias: Any = None
        if node.target is aten.linear.default:
            x, weight, bias = (*node.args, None)[:3]
        elif node.target is aten.addmm.default:
            bias, x, weight = node.args
        else:
            x, weight = node.args
        turned = node.target is not aten.linear.default
        plain = not node.kwargs and x in data and not {weight, bias} & data
        if plain and value(weight).ndim == 2 and (bias is None or value(bias).ndim == 1) and (key := _key(weight)):
            yield Linear(node, x, weight, bias, turned, key)


def _key(weight: fx.Node) -> str:
    """The first weight that a matrix is made of."""
    if is_weight(weight):
        return binding(weight).key
    return next((key for n in weight.all_input_nodes if (key := _key(n))), "")


def _others(entry: Entry, found: set[fx.Node], data: set[fx.Node]) -> dict[str, str]:
    kept: dict[str, str] = {}
    for node in entry.calls(*PRODUCTS, *OTHERS):
        weights = [n for n in node.all_input_nodes if n not in data and value(n).ndim > 1]
        if node not in found and weights and any(n in data for n in node.all_input_nodes):
            kept |= {key: f"{node.target} is no linear layer" for n in weights if (key := _key(n))}
    return kept


def heads(program: Program, linears: set[fx.Node], data: set[fx.Node]) -> set[fx.Node]:
    """Linears that no other follows and whose results are returned as they are, but for views and the like."""
    through = THROUGH | ({"tanh"} if program.info.get("kind") == "causal-lm" else frozenset())
    ends = {end for node in program.main.results() if (end := _source(node, linears, data, through)) is not None}
    return {end for end in ends if not (reached(end.users) & linears)}


def _source(node: fx.Node, linears: set[fx.Node], data: set[fx.Node], through: frozenset[str]) -> fx.Node | None:
    """The linear that a result comes from; None when it is more than that."""
    while node not in linears:
        real = [n for n in node.all_input_nodes if n in data and _is_real(n)]
        if len(real) != 1 or node.op != "call_function" or _op_name(node.target) not in through:
            return None
        node = real[0]
    return node


def _is_real(node: fx.Node) -> bool:
    fact = value(node)
    parts = fact if isinstance(fact, tuple | list) else (fact,)
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _op_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def rewrite(entry: Entry, chosen: Iterable[Linear], level: int, format: str) -> None:
    """Every chosen linear becomes one op."""
    done: dict[fx.Node, fx.Node] = {}
    for linear in chosen:
        node, x, weight = linear.node, done.get(linear.x, linear.x), linear.weight
        if linear.turned:
            weight = entry.emit(aten.t.default, weight, before=node, made_by=MADE_BY)
        new = entry.emit(HALO_LINEAR, x, weight, linear.bias, level, format, linear.name, before=node, made_by=MADE_BY)
        entry.replace(node, new)
        done[node] = new
    entry.sweep()


def turned_in(weight: fx.Node) -> bool | None:
    """Whether linear layers read a weight transposed; None where something else reads it as well."""
    if all(_is_matrix(weight, user) for user in weight.users):
        return False
    views = [user for user in weight.users if user.target is aten.t.default]
    same = len(views) == len(weight.users) and all(_is_matrix(view, user) for view in views for user in view.users)
    return True if same else None


def _is_matrix(node: fx.Node, user: fx.Node) -> bool:
    return user.target is HALO_LINEAR and [i for i, a in enumerate(user.args) if a is node] == [1]
