"""split(x W^T + b) -> x W1^T + b1, x W2^T + b2, ...: a layer whose result is only taken apart becomes its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

aten = torch.ops.aten
LINEAR, RESHAPE, PERMUTE = aten.linear.default, aten.reshape.default, aten.permute.default
SLICE, SELECT = aten.slice.Tensor, aten.select.int


@dataclass(frozen=True)
class SplitLinears(Pass):
    """Queries, keys and values, or gate and up, stored as one weight get weights of their own, so that each can be
    rotated, skipped or given its own bits. Kernels join layers over one input again.
    """

    name: ClassVar[str] = "split-linears"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        changes, splits = Changes(), dict[str, list[tuple[Entry, Split]]]()
        whole: set[str] = set()
        for entry in program.entries.values():
            for weight in entry.placeholders("weight"):
                for user in weight.users:
                    split = _split(user)
                    if split is None:
                        whole.add(binding(weight).key)
                    elif user.args[1] is weight:
                        splits.setdefault(binding(weight).key, []).append((entry, split))
        for key, found in splits.items():
            if key in whole:
                changes.refuse("split", Refusal("the weight is also read whole", found[0][1].layer), key)
                continue
            made: dict[tuple[str, tuple[int, ...]], str] = {}
            for entry, split in found:
                for part in split.parts:
                    _replace(program, entry, split, part, made)
                changes.apply("split", split.layer)
        return changes


@dataclass(frozen=True)
class Part:
    """A reader of some features: which rows of the weight they are, in order, and the views from them to its shape."""

    reader: fx.Node
    rows: Tensor
    shape: list[Any] | None
    order: list[int] | None


@dataclass(frozen=True)
class Split:
    layer: fx.Node
    parts: tuple[Part, ...]


def _split(layer: fx.Node) -> Split | None:
    """How the features of a linear layer over stored tensors are taken apart: by slices, or views and selections."""
    if layer.target is not LINEAR or value(layer.args[1]).dim() != 2:  # type: ignore[arg-type]
        return None
    given = arguments(layer)
    if not is_weight(given["weight"]) or not (given["bias"] is None or is_weight(given["bias"])):
        return None
    view = _only_user(layer, RESHAPE)
    order = _only_user(view or layer, PERMUTE)
    leaf = order or view or layer
    features = _features(layer, view)
    if features is None or not leaf.users:
        return None
    parts = [_part(user, leaf, view, order, features) for user in leaf.users]
    return Split(layer, tuple(cast("list[Part]", parts))) if None not in parts and len(parts) > 1 else None


def _only_user(node: fx.Node, target: object) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _features(layer: fx.Node, view: fx.Node | None) -> list[int] | None:
    """The trailing sizes that the view gives the features of the layer."""
    width = value(layer).shape[-1]
    if view is None:
        return [width]
    sizes: list[int] = []
    for size in reversed(value(view).shape):
        if math.prod(sizes) == width or not isinstance(size, int):
            break
        sizes.insert(0, size)
    return sizes if math.prod(sizes) == width else None


def _part(
    user: fx.Node, leaf: fx.Node, view: fx.Node | None, order: fx.Node | None, features: list[int]
) -> Part | None:
    rank, count = value(leaf).dim(), len(features)
    places = list(range(rank)) if order is None else [d % rank for d in cast("list[int]", order.args[1])]
    if user.target not in (SLICE, SELECT) or user.args[0] is not leaf:
        return None
    given = arguments(user)
    axis = places[given["dim"] % rank] - (rank - count)
    rows = torch.arange(math.prod(features)).reshape(features)
    if user.target is SELECT and axis >= 0 and count > 1 and isinstance(given["index"], int):
        kept = [p - (p > rank - count + axis) for p in places if p != rank - count + axis]
        return _viewed(user, rows.select(axis, given["index"]), view, kept if order else None, count)
    if user.target is SLICE and axis == count - 1 and given["step"] == 1 and places[-1] == rank - 1:
        start, end = given["start"] or 0, given["end"]
        if isinstance(start, int) and (end is None or isinstance(end, int)):
            return _viewed(user, rows[..., start:end], view, places if order else None, count)
    return None


def _viewed(user: fx.Node, rows: Tensor, view: fx.Node | None, order: list[int] | None, count: int) -> Part:
    """The views again, over the features that are left."""
    if view is None:
        return Part(user, rows.flatten(), None, order)
    lead = list(cast("list[Any]", view.args[1]))[:-count]
    return Part(user, rows.flatten(), [*lead, *rows.shape], order)


def _replace(
    program: Program, entry: Entry, split: Split, part: Part, made: dict[tuple[str, tuple[int, ...]], str]
) -> None:
    x, *stored = [a for a in split.layer.args if a is not None]
    mine = [_rows_of(program, entry, cast(fx.Node, tensor), part.rows, made) for tensor in stored]
    node = entry.emit(LINEAR, x, *mine, before=part.reader, made_by=SplitLinears.name)
    if part.shape is not None:
        node = entry.emit(RESHAPE, node, part.shape, before=part.reader, made_by=SplitLinears.name)
    if part.order is not None:
        node = entry.emit(PERMUTE, node, part.order, before=part.reader, made_by=SplitLinears.name)
    entry.replace(part.reader, node)


def _rows_of(
    program: Program, entry: Entry, tensor: fx.Node, rows: Tensor, made: dict[tuple[str, tuple[int, ...]], str]
) -> fx.Node:
    key = binding(tensor).key
    name = (key, tuple(rows.tolist()))
    if name not in made:
        stem, _, last = key.rpartition(".")
        made[name] = program.weights.fresh(f"{stem}.part.{last}" if stem else f"part.{last}")
        program.weights[made[name]] = program.weights[key][rows]
    return entry.bind("weight", made[name], program.weights[made[name]])
