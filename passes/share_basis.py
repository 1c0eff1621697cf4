"""x W_l^T -> (x B^T) C_l^T: layers of neighbouring blocks share a basis B, their coefficients C_l stay their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.gram import Whitening, input_grams
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.passes.shared_layers import (
    ATTENTION,
    FEED_FORWARD,
    Layer,
    Series,
    find_series,
    require_blocks,
    require_kinds,
    total_parameters,
)

LINEAR = torch.ops.aten.linear.default
KINDS = (*ATTENTION, *FEED_FORWARD)
STAGE = "share basis"


@dataclass(frozen=True)
class ShareBasis(Pass):
    """The weights of `group` blocks side by side, whitened by their inputs, factored by singular values (Wang et al.,
    2025: "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model Compression").

    `ratio` of the parameters of `kinds` goes away; `rank` sets the size of every basis instead. Layers of `private`
    kinds are factored each for itself. `update` fits the coefficients again, to inputs that the factored program gives.
    """

    name: ClassVar[str] = "share-basis"
    contract: ClassVar[Contract] = "lossy"
    ratio: float = 0.2
    group: int = 2
    kinds: tuple[str, ...] = KINDS
    private: tuple[str, ...] = ("o", "down")
    rank: int = 0
    update: bool = False

    def __post_init__(self) -> None:
        for option, number, least in (("group", self.group, 1), ("rank", self.rank, 0)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{option} is {number!r}, expected a whole number")
            if number < least:
                raise ValueError(f"{option} is {number}, expected at least {least}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio is {self.ratio!r}, expected a number")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, expected a part between 0 and 1")
        if not isinstance(self.update, bool):
            raise TypeError(f"update is {self.update!r}, expected True or False")
        object.__setattr__(self, "kinds", require_kinds("kinds", self.kinds, KINDS))
        object.__setattr__(self, "private", require_kinds("private", self.private, KINDS, empty=True))

    def requires(self, program: Program) -> None:
        require_blocks(program, self.name)

    def run(self, program: Program) -> Changes:
        changes = Changes()
        series = find_series(program, self.kinds, changes)
        if not series:
            changes.refuse("basis", Refusal("no layer of repeated blocks can share a basis"), "blocks")
            return changes
        layers = [layer for s in series for layer in s.layers]
        if program.calibration and program.calibration.fit:
            grams = input_grams(program, [layer.node for layer in layers], f"{STAGE}: inputs")
        else:
            grams = {}
            changes.note("no calibration data: weights are factored without regard to their inputs")
        groups = [group for s in series for group in self._groups(s)]
        made: list[Factored] = []
        for number, group in enumerate(groups):
            report(STAGE, number, len(groups))
            made += self._share(program, group, [grams[layer.node] for layer in group] if grams else [], changes)
        if self.update:
            self._refit(program, made, changes)
        kept = sum(program.weights[key].numel() for key in {k for f in made for k in (f.basis, f.coefficients)})
        total = total_parameters(series)
        changes.note(f"parameters {total} -> {kept}, {1 - kept / total:.1%} removed")
        return changes

    def _groups(self, series: Series) -> Iterator[Sequence[Layer]]:
        size = 1 if series.kind in self.private else self.group
        yield from (series.layers[i : i + size] for i in range(0, len(series.layers), size))

    def size(self, shape: tuple[int, int], count: int) -> int:
        """r such that r (k + count n) is 1 - ratio of count n k, or the rank asked for; the weights allow no more."""
        n, k = shape
        wanted = self.rank or int((1 - self.ratio) * count * n * k / (k + count * n))
        return max(1, min(wanted, k, count * n))

    def _share(
        self, program: Program, group: Sequence[Layer], grams: Sequence[Tensor], changes: Changes
    ) -> Iterator[Factored]:
        rank = self.size(group[0].shape, len(group))
        weights = [program.weights[layer.key] for layer in group]
        basis, coefficients = shared_basis(weights, sum(grams[1:], grams[0]) if grams else None, rank)
        key = program.weights.fresh(f"{group[0].key}.basis")
        program.weights[key] = basis.float()
        for layer, found in zip(group, coefficients, strict=True):
            own = program.weights.fresh(f"{layer.key}.coefficients")
            program.weights[own] = found.float().contiguous()
            yield Factored(layer, key, own, program.weights[layer.key], _replace(program, layer, key, own))
            changes.apply(f"factor {layer.kind}", layer.key)
            what = f"{layer.kind}: basis of {rank}" + (f" for {len(group)} blocks" if len(group) > 1 else "")
            changes.became(layer.path, layer.part, what)

    def _refit(self, program: Program, made: Sequence[Factored], changes: Changes) -> None:
        if not program.calibration or not program.calibration.fit:
            changes.note("update needs calibration data: coefficients stay as they are")
            return
        grams = input_grams(program, [f.first for f in made], f"{STAGE}: inputs of the factored program")
        for f in made:
            basis = program.weights[f.basis]
            program.weights[f.coefficients] = fitted(f.weight, basis, grams[f.first]).float().contiguous()


@dataclass(frozen=True)
class Factored:
    """A layer that was replaced: its keys, its weight, and the first of its two layers in the main entry."""

    layer: Layer
    basis: str
    coefficients: str
    weight: Tensor
    first: fx.Node


def shared_basis(weights: Sequence[Tensor], gram: Tensor | None, rank: int) -> tuple[Tensor, list[Tensor]]:
    """B [r, k] and C_l [n, r] with the least sum of |(W_l - C_l B) x|^2 over inputs x with E[x x^T] = `gram`."""
    whitening = Whitening(gram)
    u, s, vt = torch.linalg.svd(whitening.apply(torch.cat([w.double() for w in weights])), full_matrices=False)
    basis = whitening.undo(s[:rank, None] * vt[:rank])
    return basis, list(u[:, :rank].split([len(w) for w in weights]))


def fitted(weight: Tensor, basis: Tensor, gram: Tensor) -> Tensor:
    """C = W A B^T (B A B^T)^-1: the least squared error on inputs with E[x x^T] = A, for a basis that is given."""
    wide = basis.double() @ gram
    found: Tensor = torch.linalg.lstsq(wide @ basis.double().T, wide @ weight.double().T).solution
    return found.T


def _replace(program: Program, layer: Layer, basis: str, own: str) -> fx.Node:
    """Two layers in every entry; returns the first of the main one."""
    first = {}
    for entry, node in layer.uses:
        given = arguments(node)
        b, c = (entry.bind("weight", key, program.weights[key]) for key in (basis, own))
        low = entry.emit(LINEAR, given["input"], b, before=node, made_by=ShareBasis.name)
        entry.replace(node, entry.emit(LINEAR, low, c, given["bias"], before=node, made_by=ShareBasis.name))
        first[node] = low
    return first[layer.node]
