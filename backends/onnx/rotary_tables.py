"""Angles of rotary positions as tables [positions, pairs], found by running what computes them from positions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.builder import Builder
from sylvester.backends.onnx.graph import numpy_of
from sylvester.compiler.program import Entry, Output, binding, value

aten = torch.ops.aten
ROPE = torch.ops.sylvester.rope.default
MULTIPLE = 8
"""Of pairs, that onnxruntime takes."""
TRIED = ((1, 0), (1, 5), (3, 2))
"""Tokens and their position where the table is compared with what the graph computes."""


@dataclass(frozen=True)
class Tables:
    """Names of the stored cosines and sines."""

    cos: str
    sin: str
    interleaved: bool

    def values(self, b: Builder) -> tuple[ir.Value, ir.Value]:
        return b.stored(self.cos), b.stored(self.sin)


def tables(b: Builder, q: fx.Node, k: fx.Node) -> Tables | None:
    """The tables by which both are turned; None where that is not by their position alone."""
    if q.target is not ROPE or k.target is not ROPE or q.args[1:] != k.args[1:]:
        return None
    cos, sin, interleaved = cast("tuple[fx.Node, fx.Node, bool]", q.args[1:])
    known = b.tables
    if (cos, sin) not in known:
        known[cos, sin] = _stored(b, cos, sin, interleaved)
    names = known[cos, sin]
    return None if names is None else Tables(*names, interleaved)


def _stored(b: Builder, cos: fx.Node, sin: fx.Node, interleaved: bool) -> tuple[str, str] | None:
    found = [_halved(table, interleaved) for table in _computed(b, cos, sin) or ()]
    if not found or any(t is None or t.shape[1] % MULTIPLE for t in found):
        return None
    names = []
    for kind, table in zip(("cos", "sin"), found, strict=True):
        digest = hashlib.sha256(numpy_of(cast(Tensor, table)).data).hexdigest()[:8]
        names.append(b.store.put(f"rotary.{kind}.{digest}", cast(Tensor, table)))
    return names[0], names[1]


def _halved(table: Tensor, interleaved: bool) -> Tensor | None:
    """One angle per pair, where both of a pair have the same."""
    first, second = (table[:, ::2], table[:, 1::2]) if interleaved else table.chunk(2, -1)
    return first.contiguous() if torch.equal(first, second) else None


def _computed(b: Builder, cos: fx.Node, sin: fx.Node) -> list[Tensor] | None:
    """Both tables [longest, width], checked at other positions."""
    probe = _probe(b.entry, cos, sin)
    longest = b.program.info.get("max_length", 0)
    if probe is None or not longest:
        return None
    whole = _run(b, probe, int(longest), 0)
    past = any(value(n).dim() == 0 for n in probe.placeholders("input"))
    for count, start in TRIED:
        if start + count <= longest and (past or start == 0):
            rows = _run(b, probe, count, start)
            if not all(
                torch.allclose(r, t[start : start + count], atol=1e-6) for r, t in zip(rows, whole, strict=True)
            ):
                return None
    return whole


def _probe(entry: Entry, cos: fx.Node, sin: fx.Node) -> Entry | None:
    """The part of the graph that computes the angles; None where it reads more than sizes and the position."""
    probe = entry.clone()
    named = {node.name: node for node in probe.graph.nodes}
    probe.graph.output_node().args = ((named[cos.name], named[sin.name]),)
    probe.outputs = [Output("output", "cos"), Output("output", "sin")]
    probe.sweep()
    for node in probe.placeholders("input"):
        sized = all(user.target is aten.sym_size.int for user in node.users)
        if value(node).dim() and not sized:
            return None
    return None if probe.placeholders("state") else probe


def _run(b: Builder, probe: Entry, count: int, start: int) -> list[Tensor]:
    """Cosines and sines [count, width] of the first row, for tokens at `start` and after."""
    given: dict[str, Tensor] = {}
    for node in probe.placeholders("input"):
        fact: Tensor = value(node)
        shape = (1, count) if fact.dim() == 2 else ()
        given[binding(node).key] = torch.full(shape, start if not shape else 0, dtype=fact.dtype)
    sources = {"input": given, "weight": b.program.weights}
    arguments = [sources[binding(n).kind][binding(n).key] for n in probe.placeholders()]
    with torch.no_grad():
        found = fx.GraphModule(torch.nn.Module(), probe.graph)(*arguments)
    return [t.reshape(-1, t.shape[-2], t.shape[-1])[0].float() for t in found]
