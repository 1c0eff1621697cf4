"""(n(x) g + b) W^T + c -> n(x) (W g)^T + (c + W b);  layer_norm(x) -> rms_norm(x M) with M = I - 1 1^T / d folded.

Norms without scale or shift commute with every rotation of the stream (Ashkboos et al., 2024: SliceGPT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program, binding, is_weight, value
from sylvester.compiler.space_rules import NORMS, infer
from sylvester.compiler.spaces import Space
from sylvester.passes.center_streams import center_streams

aten = torch.ops.aten
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
RMS_NORM = torch.ops.sylvester.rms_norm.default
VIEWS = (
    aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor,
    aten.select.int, aten.cat.default, aten.clone.default, aten.alias.default, aten.to.dtype, aten.mean.dim,
)  # fmt: skip
"""Between a norm and its readers these keep both scale and shift of each feature."""
SCALES = (
    aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.sum.dim_IntList,
)  # fmt: skip
"""These keep the scale, not the shift."""
ROWS_AT_ONCE = 1 << 20
"""Values of a weight that are scaled at a time, in float64."""
Tied = Literal["auto", "online", "split"]


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Folds where only linear layers read a norm, in float64; layer norms of a stream that can be centred become RMS.

    `tied`: what a head that shares the embedding does. "online" keeps one copy, and the norm before it; "split" gives
    the head a copy of its own; "auto" keeps one copy unless the vocabulary is so small that two transforms of a row
    would cost more than 1 % of the head.
    """

    name: ClassVar[str] = "fold-norms"
    contract: ClassVar[Contract] = "exact"
    tied: Tied = "auto"

    def __post_init__(self) -> None:
        if self.tied not in ("auto", "online", "split"):
            raise ValueError(f"tied is {self.tied!r}, expected 'auto', 'online' or 'split'")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for key in tied_tables(program):
            self._tie(program, key, changes)
        for space in infer(program):
            norms = _norms(space)
            if not norms:
                continue
            refusal = _refusal(space, norms)
            if refusal:
                changes.refuse("fold", refusal, norms[0])
            elif any(_affine(norms[0])):
                _fold(program, space, norms)
                changes.apply("fold", norms[0])
        center_streams(program, changes)
        return changes

    def _tie(self, program: Program, key: str, changes: Changes) -> None:
        table = program.weights[key]
        vocabulary, width = table.shape
        megabytes = f"{table.numel() * table.element_size() / 1e6:.1f} MB"
        if self.tied == "split" or (self.tied == "auto" and vocabulary < 100 * width.bit_length()):
            split(program, key)
            changes.apply("split", key)
            changes.note(f"{key} is both embedding and head: the head got a copy of its own, {megabytes}")
        else:
            changes.note(
                f"{key} is both embedding and head: kept as one, so that the norm before the head stays and a rotation "
                f"of the stream costs transforms of {width} values per token there instead of {megabytes}"
            )


def tied_tables(program: Program) -> list[str]:
    """Keys that an embedding and a linear layer share."""
    uses: dict[str, set[object]] = {}
    for entry in program.entries.values():
        for node in entry.placeholders("weight"):
            uses.setdefault(binding(node).key, set()).update(user.target for user in node.users)
    return [key for key, targets in uses.items() if {LINEAR, EMBEDDING} <= targets]


def split(program: Program, key: str) -> None:
    """Linear layers read a weight of their own, equal to the embedding's."""
    own = program.weights.fresh(f"{key}.head")
    program.weights[own] = program.weights[key]
    for entry in program.entries.values():
        for node in entry.calls(LINEAR):
            weight = node.args[1]
            if isinstance(weight, fx.Node) and is_weight(weight) and binding(weight).key == key:
                node.replace_input_with(weight, entry.bind("weight", own, program.weights[own]))


def _norms(space: Space) -> list[fx.Node]:
    """The norms whose results make up the space."""
    return [node for node in space.made() if node.target in NORMS]


def _affine(norm: fx.Node) -> tuple[Any, Any]:
    given = arguments(norm)
    return given["weight"], given.get("bias")


def _refusal(space: Space, norms: list[fx.Node]) -> Refusal | None:
    if not space.reads:
        return Refusal("no linear layer reads the norm", norms[0])
    for pin in space.pins:
        if pin.kind != "made" or pin.node not in norms:
            return Refusal(f"not only linear layers read the norm: {pin.reason}", pin.user or pin.node)
    shifted = any(shift is not None for _, shift in map(_affine, norms))
    keeps = VIEWS if shifted else (*VIEWS, *SCALES)
    other = next((n for n in space.nodes if n not in norms and n.target not in keeps), None)
    if other is not None:
        return Refusal(f"{other.name} shares the basis of what the norm gives", norms[0])
    if not _one_axis(space, norms) or space.slots or space.sizes != {space.width}:
        return Refusal("the features of the norm are not those that linear layers read", norms[0])
    if any(a is not None and not is_weight(a) for norm in norms for a in _affine(norm)):
        return Refusal("its scale or shift is computed", norms[0])
    if len({tuple(_key(a) for a in _affine(norm)) for norm in norms}) > 1:
        return Refusal("layers with one weight follow norms with different scales", norms[0])
    return None


def _one_axis(space: Space, norms: list[fx.Node]) -> bool:
    """Whether norms are over the last axis, and weights belong to the layers that read them."""
    layers = {_key(layer.args[1]) for readers in space.reads.values() for layer in readers}
    over = [arguments(norm).get("normalized_shape", [0]) for norm in norms]
    return all(len(shape) == 1 for shape in over) and {(a.key, a.axis) for a in space.axes} == {(k, 1) for k in layers}


def _key(weight: object) -> str:
    return binding(weight).key if isinstance(weight, fx.Node) else ""


def _fold(program: Program, space: Space, norms: list[fx.Node]) -> None:
    gain, shift = (None if a is None else program.weights[_key(a)].double() for a in _affine(norms[0]))
    layers = [layer for readers in space.reads.values() for layer in readers]
    made: dict[tuple[str, str], str] = {}
    for layer in layers:
        if shift is not None:
            _add_bias(program, layer, shift, made)
    for axis in space.axes:
        if gain is not None:
            program.weights[axis.key] = scaled_columns(program.weights[axis.key], gain)
    for norm in norms:
        x, eps = norm.args[0], arguments(norm)["eps"]
        plain = (x, [value(norm).shape[-1]], None, None, eps, False)
        norm.args = (x, None, eps) if norm.target is RMS_NORM else plain
        norm.kwargs = {}


def _add_bias(program: Program, layer: fx.Node, shift: Tensor, made: dict[tuple[str, str], str]) -> None:
    """The layer adds W shift as well; layers with the same weight and bias share the sum."""
    given = arguments(layer)
    weight, bias = given["weight"], given["bias"]
    name = (_key(weight), _key(bias))
    if name not in made:
        stored = program.weights[name[0]]
        total = torch.cat([rows.double() @ shift for rows in stored.split(_rows(stored))])
        total = total if bias is None else total + program.weights[name[1]].double()
        made[name] = program.weights.fresh(f"{name[0].removesuffix('weight')}bias.folded")
        program.weights[made[name]] = total.to(stored.dtype)
    entry = program.entry_of(layer)
    layer.args = (*layer.args[:2], entry.bind("weight", made[name], program.weights[made[name]]), *layer.args[3:])
    layer.kwargs = {}


def scaled_columns(weight: Tensor, factor: Tensor) -> Tensor:
    """W diag(factor), computed in float64 some rows at a time."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for new, old in zip(result.split(_rows(weight)), weight.split(_rows(weight)), strict=True):
        new.copy_(old.double() * factor)
    return result


def _rows(weight: Tensor) -> int:
    return max(1, ROWS_AT_ONCE // max(1, weight[0].numel()))
