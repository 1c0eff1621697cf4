"""x W^T -> x Q^T with W rounded to bfloat16, int8 or int4 numbers Q and scales; a tied embedding reads the same Q."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding, is_weight
from sylvester.compiler.quantization import round_bf16, round_int4, round_int8

aten = torch.ops.aten
Weights = Literal["bf16", "int8", "int4"]
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
OPS = {
    "bf16": (dialect.linear_bf16, dialect.widen_bf16),
    "int8": (dialect.linear_w8a8, dialect.dequantize_w8),
    "int4": (dialect.linear_w4a8, dialect.dequantize_w4),
}
INT4_GROUP = 32
LEAST_DEPTH = 32
"""Rows shorter than this gain nothing from whole numbers."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Round the weights of linear layers to nearest; with int8 and int4, rows of x become int8 as they are read.

    `weights` is "bf16", "int8" or "int4". `group` columns share a scale: 32, 64 or 128, or 0 for one scale per row
    (int8) and 32 (int4). `embeddings` rounds tables that no linear layer shares too. `skip` names weights to leave, by
    patterns such as "lm_head.*".
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = "lossy"
    weights: Weights = "int8"
    group: int = 0
    embeddings: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights not in OPS:
            raise ValueError(f"weights is {self.weights!r}, expected one of {list(OPS)}")
        if self.group and (self.weights == "bf16" or self.group not in dialect.GROUPS):
            raise ValueError(
                f"group is {self.group} for {self.weights}, expected 0, or for int one of {dialect.GROUPS}"
            )
        if not isinstance(self.skip, tuple):
            raise TypeError(f"skip is {self.skip!r}, expected a tuple of patterns")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for key, uses in _uses(program, changes).items():
            refusal = self._refusal(program, key, uses)
            if refusal:
                changes.refuse(uses.kind, refusal, key)
                continue
            self._rewrite(program, uses, self._store(program, key))
            changes.apply(uses.kind, key)
        return changes

    def _refusal(self, program: Program, key: str, uses: Uses) -> Refusal | None:
        weight, group = program.weights[key], self._group
        reasons = {
            "`skip` names it": any(fnmatch(key, pattern) for pattern in self.skip),
            f"{', '.join(uses.others)} reads the weight too": uses.others,
            "an embedding alone is left in float; `embeddings=True` rounds it": not (uses.linears or self.embeddings),
            f"the weight is {weight.dtype}{list(weight.shape)}, expected a float32 matrix": _no_matrix(weight),
            f"the depth is {weight.shape[-1]}, expected at least {LEAST_DEPTH}": self._shallow(weight),
            f"groups of {group} do not divide the depth of {weight.shape[-1]}": group and weight.shape[-1] % group,
        }
        return next((Refusal(reason) for reason, found in reasons.items() if found), None)

    def _shallow(self, weight: Tensor) -> bool:
        return self.weights != "bf16" and weight.shape[-1] < LEAST_DEPTH

    @property
    def _group(self) -> int:
        return self.group or (INT4_GROUP if self.weights == "int4" else 0)

    def _store(self, program: Program, key: str) -> list[str]:
        """Round one weight and forget it; returns the keys of the numbers and of the scales."""
        tensors = self._rounded(program.weights[key])
        names = [program.weights.fresh(f"{key}.{suffix}") for suffix in (self.weights, "scales")[: len(tensors)]]
        for name, tensor in zip(names, tensors, strict=True):
            program.weights[name] = tensor
        del program.weights[key]
        return names

    def _rounded(self, weight: Tensor) -> tuple[Tensor, ...]:
        if self.weights == "bf16":
            return (round_bf16(weight),)
        return round_int8(weight, self._group) if self.weights == "int8" else round_int4(weight, self._group)

    def _rewrite(self, program: Program, uses: Uses, keys: list[str]) -> None:
        linear, widen = OPS[self.weights]
        for entry, node in uses.linears:
            given = arguments(node)
            operands = [given["input"], *_bound(program, entry, keys), given["bias"]]
            entry.replace(node, entry.emit(linear.target, *operands, before=node, made_by=self.name))
        for entry, node in uses.embeddings:
            table = entry.emit(widen.target, *_bound(program, entry, keys), before=node, made_by=self.name)
            node.args = (table, *node.args[1:])


@dataclass
class Uses:
    """Who reads a weight, in every entry: linear layers, embeddings, and the names of other ops."""

    linears: list[tuple[Entry, fx.Node]] = field(default_factory=list)
    embeddings: list[tuple[Entry, fx.Node]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        if self.linears:
            return "linear and embedding" if self.embeddings else "linear"
        return "embedding"

    def add(self, entry: Entry, weight: fx.Node, user: fx.Node) -> None:
        if user.target is LINEAR and _only_as(user, weight, "weight"):
            self.linears.append((entry, user))
        elif user.target is EMBEDDING:
            self.embeddings.append((entry, user))
        else:
            self.others.append(f"%{user.name}")


def _uses(program: Program, changes: Changes) -> dict[str, Uses]:
    """Uses of each stored weight that a linear layer or an embedding reads; other layers are refused."""
    found: dict[str, Uses] = {}
    for entry in program.entries.values():
        for node in entry.placeholders("weight"):
            for user in node.users:
                found.setdefault(binding(node).key, Uses()).add(entry, node, user)
        for node in entry.calls(LINEAR):
            weight: Any = arguments(node)["weight"]
            if not is_weight(weight):
                changes.refuse("linear", Refusal(f"the weight %{weight.name} is computed, expected a stored one", node))
    return {key: uses for key, uses in found.items() if uses.linears or uses.embeddings}


def _only_as(node: fx.Node, operand: fx.Node, name: str) -> bool:
    return [key for key, given in arguments(node).items() if given is operand] == [name]


def _no_matrix(weight: Tensor) -> bool:
    return weight.ndim != 2 or weight.dtype != torch.float32


def _bound(program: Program, entry: Entry, keys: list[str]) -> list[fx.Node]:
    """Placeholders of the entry for stored tensors."""
    return [entry.bind("weight", key, program.weights[key]) for key in keys]
