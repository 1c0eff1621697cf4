"""Which weights `Quantize` rounds, to how many bits and in which groups, and who reads them in every entry."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.program import Entry, Program, binding, is_weight
from sylvester.compiler.quantization import GRIDS, SMALLEST_GROUP
from sylvester.compiler.sparse_ops import SPARSE

aten = torch.ops.aten
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
FLOAT, FP16, FP8 = "float", "fp16", "fp8"
WIDTHS = (16, 8, 4, 3, FP16, FP8)
NAMES = {16: "bf16", FP16: FP16, FP8: FP8, 8: "int8", 4: "int4", 3: "int3"}
"""What weights are stored as, by `WIDTHS`; the ends of their keys."""
LEAST_DEPTH = 32
"""Rows shorter than this gain nothing from whole numbers."""


@dataclass(frozen=True)
class Width:
    """Bits of a weight, or its short float, and of the rows of x; `group` columns share a scale, or with 0 a whole row.

    Rows under float8 are float8, under other short floats they are the same ones.
    """

    weights: int | str
    activations: int
    group: int

    @property
    def whole(self) -> bool:
        return self.weights in GRIDS

    @property
    def stepped(self) -> bool:
        """Whether rows may share one scale."""
        return self.whole and self.activations != 16

    @property
    def name(self) -> str:
        return NAMES[self.weights]


Choice = Width | str
"""A width, or `FLOAT`."""


def pairs(given: object) -> tuple[tuple[str, int | str], ...]:
    """`per_layer` as patterns with their choices; raises TypeError for anything else than a mapping or pairs."""
    listed = tuple(given.items()) if isinstance(given, Mapping) else given
    if isinstance(listed, tuple) and all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in listed
    ):
        return listed
    raise TypeError(f'per_layer is {given!r}, expected bits by pattern, such as {{"lm_head.*": 8}}')


def parse_choice(value: object, activations: int, group: int) -> Choice:
    """A value of `per_layer`: bits of the weights, "float", or a text such as "w8a16"; raises ValueError."""
    match = re.fullmatch(r"w(16|8|4|3)a(16|8|4)", value) if isinstance(value, str) else None
    if value == FLOAT:
        return FLOAT
    if match:
        return width(int(match[1]), int(match[2]), group)
    if isinstance(value, int | str) and value in WIDTHS:
        return width(value, activations, group)
    raise ValueError(f"per_layer gives {value!r}, expected bits {WIDTHS}, {FLOAT!r}, or weights and rows as in 'w8a16'")


def width(weights: int | str, activations: int, group: int) -> Width:
    """The width with the rows and the group that the format needs."""
    if weights not in GRIDS:
        return Width(weights, 8 if weights == FP8 else 16, 0)
    return Width(weights, activations, group or (0 if weights == 8 else SMALLEST_GROUP))


@dataclass
class Uses:
    """Who reads a weight, in every entry: linear layers, embeddings, and the names of layers that skip parts of it and
    of other ops.
    """

    linears: list[tuple[Entry, fx.Node]] = field(default_factory=list)
    embeddings: list[tuple[Entry, fx.Node]] = field(default_factory=list)
    skipping: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        if self.linears or self.skipping:
            return "linear and embedding" if self.embeddings else "linear"
        return "embedding"

    def add(self, entry: Entry, weight: fx.Node, user: fx.Node) -> None:
        if user.target is LINEAR and _only_as(user, weight, "weight"):
            self.linears.append((entry, user))
        elif user.target is EMBEDDING and _only_as(user, weight, "weight"):
            self.embeddings.append((entry, user))
        elif user.target in SPARSE and _only_as(user, weight, "weight"):
            self.skipping.append(f"%{user.name}")
        else:
            self.others.append(f"%{user.name}")


@dataclass
class Layer:
    """A weight to be rounded; `stored` and `step` are the keys of what replaces it, once that is done."""

    key: str
    uses: Uses
    width: Width
    stored: list[str] = field(default_factory=list)
    step: str | None = None


@dataclass(frozen=True)
class Plan:
    """What the options say of every weight: patterns with their choices, the first that matches counts."""

    choices: Sequence[tuple[str, Choice]]
    default: Width
    skip: Sequence[str]
    embeddings: bool

    def layers(self, program: Program, changes: Changes) -> list[Layer]:
        """Those to round, in the order of their first use; refusals and notes go to `changes`."""
        found = []
        names = _names(program)
        uses_of = _uses(program, changes)
        for key, uses in uses_of.items():
            layer = self._layer(key, uses, names[key], program.weights[key], changes)
            if isinstance(layer, Refusal):
                changes.refuse(uses.kind, layer, key)
            else:
                found.append(layer)
        self._note_unmatched([name for key in uses_of for name in names[key]], changes)
        return found

    def _layer(self, key: str, uses: Uses, names: list[str], weight: Tensor, changes: Changes) -> Layer | Refusal:
        choice = next((choice for pattern, choice in self.choices if _matches(names, pattern)), self.default)
        reasons = {
            "`skip` names it": any(_matches(names, pattern) for pattern in self.skip),
            f"{', '.join(uses.skipping)} skips parts of it, which kernels do in float32": uses.skipping,
            f"{', '.join(uses.others)} reads the weight too": uses.others,
            "an embedding alone is left in float; `embeddings=True` rounds it": not (uses.linears or self.embeddings),
            f"the weight is {weight.dtype}{list(weight.shape)}, expected a float32 matrix": _no_matrix(weight),
        }
        refusal = next((Refusal(reason) for reason, found in reasons.items() if found), None)
        if refusal is not None:
            return refusal
        if isinstance(choice, str):
            return Refusal("`per_layer` leaves it in float")
        depth = weight.shape[1]
        if choice.whole and depth < LEAST_DEPTH:
            return Refusal(f"the depth is {depth}, expected at least {LEAST_DEPTH}")
        return Layer(key, uses, _fitting(choice, depth, changes))

    def _note_unmatched(self, names: list[str], changes: Changes) -> None:
        for option, patterns in (("per_layer", [p for p, _ in self.choices]), ("skip", self.skip)):
            for pattern in patterns:
                if not _matches(names, pattern):
                    changes.note(f"{option} names {pattern!r}, which no weight of a linear layer or embedding matches")


def _fitting(wanted: Width, depth: int, changes: Changes) -> Width:
    """The next wider format where rows of this depth do not fill whole bytes."""
    if not isinstance(wanted.weights, int):
        return wanted
    bits = next(b for b in sorted({wanted.weights, *GRIDS}) if b >= wanted.weights and not _left_over(b, depth))
    if bits == wanted.weights:
        return wanted
    step = GRIDS[wanted.weights].step
    changes.note(f"int{bits} instead of {wanted.name}: the depth of {depth} is not a multiple of {step}")
    return width(bits, wanted.activations, wanted.group)


def _left_over(bits: int, depth: int) -> int:
    return depth % GRIDS[bits].step if bits in GRIDS else 0


def _matches(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatch(name, pattern) for name in names)


def _names(program: Program) -> dict[str, list[str]]:
    """Every key with its aliases."""
    found = {key: [key] for key in program.weights}
    for alias, key in program.weights.aliases.items():
        found.setdefault(key, [key]).append(alias)
    return found


def _uses(program: Program, changes: Changes) -> dict[str, Uses]:
    """Uses of each stored weight that a linear layer or an embedding reads; other layers are refused."""
    found: dict[str, Uses] = {}
    for entry, weight, user in _reads(program):
        found.setdefault(binding(weight).key, Uses()).add(entry, weight, user)
    for entry in program.entries.values():
        for node in entry.calls(LINEAR):
            given: Any = arguments(node)["weight"]
            if not is_weight(given):
                changes.refuse("linear", Refusal(f"the weight %{given.name} is computed, expected a stored one", node))
    return {key: uses for key, uses in found.items() if uses.linears or uses.embeddings or uses.skipping}


def _reads(program: Program) -> Iterator[tuple[Entry, fx.Node, fx.Node]]:
    for entry in program.entries.values():
        for weight in entry.placeholders("weight"):
            yield from ((entry, weight, user) for user in weight.users)


def _only_as(node: fx.Node, operand: fx.Node, name: str) -> bool:
    return [key for key, given in arguments(node).items() if given is operand] == [name]


def _no_matrix(weight: Tensor) -> bool:
    return weight.ndim != 2 or weight.dtype != torch.float32
