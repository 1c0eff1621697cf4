"""x + f(x) -> x + f(x) unless skips[n] > 0, for every attention and feed-forward part of `decode`: each call chooses.

A part that is skipped runs nothing: its weights are not read, and its caches stay as they are. What drafts can so be
another model in every call, such as one of fewer layers (SWIFT, Xia et al., 2025; DEL, Zarch et al., 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sylvester.compiler.cache_ops import UPDATES
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.dataflow import Segment
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.layer_lines import slots_of
from sylvester.compiler.layers import Layer, find_layers
from sylvester.compiler.parts import Part, summed
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.printing import fact
from sylvester.compiler.program import Entry, Program, binding
from sylvester.compiler.skip_ops import add_unless, update_unless
from sylvester.compiler.stages import DECODE, SKIPS

aten = torch.ops.aten
KINDS = ("attention", "ffn")


@dataclass(frozen=True)
class SkippableParts(Pass):
    """`decode` takes `skips` [parts], float32: the parts where it is above 0 are not run.

    `Program.info["skips"]` has the number of the layer and the kind of each part, in the order they run.
    """

    name: ClassVar[str] = "skippable-parts"
    contract: ClassVar[Contract] = "lossy"

    def requires(self, program: Program) -> None:
        if DECODE not in program.entries:
            raise Unsupported(f"skipping parts needs an entry 'decode', the program has {list(program.entries)}")
        if SKIPS in program.info:
            raise CompileError("the parts of 'decode' can be skipped already")

    def run(self, program: Program) -> Changes:
        changes, entry = Changes(), program.entries[DECODE]
        usable = [_Sum(layer, segment, parts) for layer, segment, parts in _sums(find_layers(program), changes)]
        found = [(known.layer, part) for known in usable for part in known.parts]
        if not found:
            raise Unsupported("no part of 'decode' can be skipped", hint="its layers add attention or FFNs to a stream")
        example = torch.zeros(len(found))
        skips = entry.bind("input", SKIPS, example)
        entry.examples[SKIPS] = example
        _guard(entry, usable, _flags(entry, skips, len(found)))
        for layer, part in found:
            changes.apply(part.kind, layer.path)
        entry.sweep()
        program.info[SKIPS] = [[layer.index, part.kind] for layer, part in found]
        return changes


@dataclass(frozen=True)
class _Sum:
    """A segment that adds parts to its start, and those of them that can be skipped."""

    layer: Layer
    segment: Segment
    parts: tuple[Part, ...]


def _sums(layers: tuple[Layer, ...], changes: Changes) -> Iterator[tuple[Layer, Segment, tuple[Part, ...]]]:
    for layer in layers:
        site = layer.sites.get(DECODE)
        by_end = {segment.end: segment for _, segment in site.parts} if site else {}
        for end, segment in by_end.items():
            parts = tuple(p for p, s in site.parts if s.end is end and p.kind in KINDS)  # type: ignore[union-attr]
            refusal = _refusal(segment) if parts else None
            if refusal:
                changes.refuse(parts[0].kind, refusal, layer.path)
            elif parts:
                yield layer, segment, parts


def _refusal(segment: Segment) -> Refusal | None:
    sums, leaves = summed(segment)
    unusual = next((node for node in sums if node.target is not aten.add.Tensor or node.kwargs), None)
    if unusual:
        return Refusal("it is not added to the stream by a plain sum", unusual)
    if leaves.count(segment.start) != 1 or fact(segment.start) != fact(segment.end):
        return Refusal("the stream is not its start plus what parts add", segment.end)
    return None


def _flags(entry: Entry, skips: fx.Node, count: int) -> list[fx.Node]:
    """Each number of `skips` as [1, 1], made before any part begins."""
    first, by, made = entry.calls()[0], SkippableParts.name, []
    for n in range(count):
        own = entry.emit(aten.slice.Tensor, skips, 0, n, n + 1, before=first, made_by=by)
        made.append(entry.emit(aten.reshape.default, own, [1, 1], before=first, made_by=by))
    return made


def _guard(entry: Entry, sums: list[_Sum], flags: list[fx.Node]) -> None:
    """Each sum adds its parts one after another, but those whose flags are set; their caches keep what they held."""
    moved: dict[fx.Node, fx.Node] = {}
    rest = iter(flags)
    for known in sums:
        end, by = known.segment.end, SkippableParts.name
        start = stream = moved.get(known.segment.start, known.segment.start)
        flag_of = {part.writer: next(rest) for part in known.parts}
        for leaf in summed(known.segment)[1]:
            if leaf in flag_of:
                stream = entry.emit(add_unless.target, stream, leaf, flag_of[leaf], before=end, made_by=by)
            elif leaf is not start:
                stream = entry.emit(aten.add.Tensor, stream, leaf, before=end, made_by=by)
        entry.replace(end, stream)
        moved[end] = stream
        for part in known.parts:
            _keep_caches(entry, part, flag_of[part.writer])


def _keep_caches(entry: Entry, part: Part, flag: fx.Node) -> None:
    slots = set(slots_of(part))
    for cache in [node for node in entry.placeholders("state") if binding(node).key in slots]:
        update = next(user for user in cache.users if user.target in UPDATES)
        given = (cache, update, flag)
        kept = entry.emit(update_unless.target, *given, before=update.next, made_by=SkippableParts.name)
        entry.graph.output_node().replace_input_with(update, kept)
