"""The parts of a residual segment: what each addend reads from the stream, how it works, what it writes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler import quantized_ops
from sylvester.compiler.cache_ops import attention_q
from sylvester.compiler.dataflow import Dataflow, Segment, walk
from sylvester.compiler.perturb import mixes_rows
from sylvester.compiler.program import Program, value

aten = torch.ops.aten
SUMS = (aten.add.Tensor, aten.sub.Tensor)
ATTENTIONS: tuple[Callable[..., Any], ...] = (
    aten.scaled_dot_product_attention.default, *quantized_ops.ATTENTIONS, attention_q.target,
)  # fmt: skip
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, *ATTENTIONS)


@dataclass(frozen=True)
class Part:
    """One addend of the residual stream: stream -> norms -> readers -> ... -> writers -> `writer`, added to the stream.

    kind: "attention", "cross_attention", "ffn", "conv", "mixer" (other mixing of tokens), "norm" or "elementwise".
    readers: the first linears or convolutions after the stream; writers: the last before `writer`.
    norms: what the readers read where it is not the stream itself: the normed stream.
    """

    kind: str
    stream: fx.Node
    writer: fx.Node
    nodes: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    writers: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]

    def __str__(self) -> str:
        norms = f" through {_names(self.norms)}" if self.norms else ""
        return f"{self.kind}: reads %{self.stream.name}{norms} by {_names(self.readers)}, writes %{self.writer.name}"


def addends(segment: Segment) -> tuple[fx.Node, ...]:
    """What the segment adds to its start; empty when its end is not such a sum."""
    inside, (_, leaves) = set(segment.nodes), summed(segment)
    branches = tuple(leaf for leaf in leaves if leaf is not segment.start)
    return branches if len(branches) < len(leaves) and all(b in inside for b in branches) else ()


def summed(segment: Segment) -> tuple[list[fx.Node], list[fx.Node]]:
    """The additions and subtractions that make the end of a segment, and what they add up."""
    inside, sums, leaves = set(segment.nodes), list[fx.Node](), list[fx.Node]()
    stack = [segment.end]
    while stack:
        node = stack.pop()
        own = node in inside and node.target in SUMS and (node is segment.end or len(node.users) == 1)
        operands = cast("list[fx.Node]", list(node.args[:2]))
        if own and all(_like(o, segment.end) for o in operands):
            sums.append(node)
            stack += reversed(operands)
        else:
            leaves.append(node)
    return sums, leaves


def find_parts(program: Program, flow: Dataflow, segment: Segment, kinds: dict[str, tuple[str, ...]]) -> list[Part]:
    """The parts of a segment. `kinds` remembers the kinds of segments with one digest, so that each is run once."""
    parts = plain_parts(flow, segment)
    if segment.digest not in kinds:
        kinds[segment.digest] = tuple(classify(program, flow, part) for part in parts)
    return [replace(part, kind=kind) for part, kind in zip(parts, kinds[segment.digest], strict=True)]


def plain_parts(flow: Dataflow, segment: Segment) -> list[Part]:
    """The parts of a segment, their kinds not yet known."""
    return [_part(segment, branch) for branch in sorted(addends(segment), key=flow.order.__getitem__)]


def _part(segment: Segment, writer: fx.Node) -> Part:
    nodes = tuple(walk(writer, set(segment.nodes)))
    fed = _fed(segment.start, nodes)
    weighted = [n for n in nodes if n in fed and is_weighted(n)]
    after = _fed(None, nodes, weighted)
    readers = tuple(n for n in weighted if not any(u in after for u in n.all_input_nodes))
    before = _before(writer, set(nodes), weighted)
    writers = tuple(n for n in weighted if n in before)
    norms = dict.fromkeys(cast(fx.Node, r.args[0]) for r in readers if r.args[0] is not segment.start)
    return Part("", segment.start, writer, nodes, readers, writers, tuple(norms))


def _fed(start: fx.Node | None, nodes: Iterable[fx.Node], more: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Those of `nodes` (in order) that depend on `start` or on one of `more`, and `more` itself."""
    found = set(more) if start is None else {start, *more}
    for node in nodes:
        if any(u in found for u in node.all_input_nodes):
            found.add(node)
    return found


def _before(writer: fx.Node, inside: set[fx.Node], stops: Iterable[fx.Node]) -> set[fx.Node]:
    """What `writer` is made of, back to the nearest of `stops`, these included."""
    ends, found, stack = set(stops), set[fx.Node](), [writer]
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack += [] if node in ends else node.all_input_nodes
    return found


def is_weighted(node: fx.Node) -> bool:
    """A linear or a convolution of any kind: an op that contracts with a matrix or filter of weights."""
    name = str(node.target)
    return node.op == "call_function" and ("linear" in name or "conv" in name)


def classify(program: Program, flow: Dataflow, part: Part) -> str:
    """What a part does, by whether tokens move each other and where the factors of its products come from."""
    fed = _fed(part.stream, part.nodes)
    products = [n for n in part.nodes if n.target in PRODUCTS]
    own = [n for n in products if all(u in fed for u in _factors(n))]
    foreign = [n for n in products if n not in own and all(u in fed or u in flow.content for u in _factors(n))]
    mixes = partial(mixes_rows, program, flow.content, part.stream, part.nodes, part.writer)
    tests: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("attention", lambda: any(n.target in ATTENTIONS for n in own)),
        ("cross_attention", lambda: foreign),
        ("conv", lambda: any("conv" in str(n.target) for n in part.nodes)),
        ("attention", lambda: own and mixes() is not False),
        ("mixer", mixes),
        ("ffn", lambda: part.readers),
        ("norm", lambda: any(_reduces(n) for n in part.nodes)),
    )
    return next((kind for kind, holds in tests if holds()), "elementwise")


def _factors(product: fx.Node) -> list[fx.Node]:
    return [a for a in product.args[:2] if isinstance(a, fx.Node)] or product.all_input_nodes


def _reduces(node: fx.Node) -> bool:
    return node.target in (aten.mean.dim, aten.sum.dim_IntList, aten.var.correction) or "norm" in str(node.target)


def _like(node: object, other: fx.Node) -> bool:
    """A tensor of the shape of `other`, so that a sum of both does not broadcast it."""
    fact = value(node) if isinstance(node, fx.Node) else None
    return isinstance(fact, Tensor) and fact.dim() == value(other).dim()


def _names(nodes: Iterable[fx.Node]) -> str:
    return ", ".join(f"%{n.name}" for n in nodes) or "nothing"
