"""W_l ~ sum_s c_ls D_s + P_l Q_l: atoms by principal components, the rest by low rank where the inputs see it.

MASA ("Share Your Attention", 2025), the training-free variant. All in float64, one group of layers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sylvester.compiler.gram import Whitening
from sylvester.compiler.program import Program
from sylvester.passes.shared_layers import Layer

TINY = 1e-150
TURNS = 2
"""How often atoms and low rank are fitted; more turns change the error by less than a hundredth."""


@dataclass(frozen=True)
class Member:
    """A layer, what its inputs are like, and what a squared error of its outputs weighs."""

    layer: Layer
    whitening: Whitening
    weight: float = 1.0


@dataclass(frozen=True)
class Cluster:
    """Layers of one kind and shape that share atoms."""

    members: tuple[Member, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.members[0].layer.shape

    def count(self, atoms: int) -> int:
        """As many atoms as there are layers at most."""
        return min(atoms, len(self.members))

    def parameters(self, atoms: int) -> int:
        """Numbers that so many atoms and their coefficients are; a lone layer stays as it is."""
        n, k = self.shape
        return n * k if len(self.members) == 1 else self.count(atoms) * (n * k + len(self.members))


def principal_atoms(weights: Sequence[Tensor], count: int, scales: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Atoms [S, n, k] of unit norm and coefficients [layers, S] with the least sum of scale |W_l - sum_s c_ls D_s|^2.

    The eigenvectors of the Gram matrix W^T W [layers, layers] of the stacked vectors give them; no mean is subtracted.
    """
    roots = torch.tensor(scales or [1.0] * len(weights), dtype=torch.float64).sqrt()
    stacked = torch.stack([w.double().flatten() for w in weights]) * roots[:, None]
    _, vectors = torch.linalg.eigh(stacked @ stacked.T)
    vectors = vectors.flip(1)[:, :count]
    atoms = vectors.T @ stacked
    norms = atoms.norm(dim=1).clamp_min(TINY)
    return (atoms / norms[:, None]).reshape(-1, *weights[0].shape), vectors * norms / roots[:, None]


def low_rank(residual: Tensor, whitening: Whitening, rank: int) -> tuple[Tensor, Tensor]:
    """P [n, r] and Q [r, k] with the least |(R - P Q) L|^2: a singular value decomposition of R L, unwhitened."""
    u, s, vt = torch.linalg.svd(whitening.apply(residual), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, whitening.undo(root[:, None] * vt[:rank])


def allocate(gains: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks of layers whose directions gain `gains` (falling) for `costs` numbers each: the best are paid for first."""
    if not gains:
        return []
    rates = torch.cat([gain / cost for gain, cost in zip(gains, costs, strict=True)])
    owners = torch.cat([torch.full((len(gain),), i) for i, gain in enumerate(gains)])
    order = torch.argsort(rates, descending=True, stable=True)
    order = order[rates[order] > 0]
    spent = torch.tensor(costs)[owners[order]].cumsum(0)
    chosen = owners[order[spent <= budget]]
    return torch.bincount(chosen, minlength=len(gains)).tolist()


@dataclass
class Refined:
    """What stands for the weight of one layer: coefficients [S] of the atoms of its cluster, and thin factors."""

    member: Member
    coefficients: Tensor = field(default_factory=lambda: torch.zeros(0))
    factors: tuple[Tensor, Tensor] | None = None

    def of_atoms(self, atoms: Tensor) -> Tensor:
        """The part [n, k] that the atoms make."""
        found: Tensor = torch.tensordot(self.coefficients.double(), atoms.double(), 1)
        return found

    def of_factors(self) -> Tensor | float:
        """The part that the factors make."""
        return 0.0 if self.factors is None else self.factors[0].double() @ self.factors[1].double()

    def weight(self, atoms: Tensor) -> Tensor:
        """The matrix [n, k] that both stand for."""
        return self.of_atoms(atoms) + self.of_factors()


@dataclass
class Shared:
    """A cluster after fitting: float32 atoms [S, n, k] and what each layer makes of them."""

    cluster: Cluster
    atoms: Tensor
    layers: list[Refined]

    @staticmethod
    def empty(cluster: Cluster) -> Shared:
        """No atoms yet; a lone layer stays as it is."""
        layers = [Refined(member) for member in cluster.members] if len(cluster.members) > 1 else []
        return Shared(cluster, torch.zeros(0, *cluster.shape), layers)

    @property
    def parameters(self) -> int:
        factors = [t for layer in self.layers for t in layer.factors or ()]
        return self.atoms.numel() + sum(t.numel() for t in (*(r.coefficients for r in self.layers), *factors))

    def refit(self, program: Program, count: int) -> None:
        """Atoms for what the factors leave."""
        if not self.layers:
            return
        left = [program.weights[r.member.layer.key].double() - r.of_factors() for r in self.layers]
        scales = [r.member.weight for r in self.layers]
        atoms, coefficients = principal_atoms(left, self.cluster.count(count), scales)
        self.atoms = atoms.float()
        for refined, found in zip(self.layers, coefficients, strict=True):
            refined.coefficients = found.float()


Watcher = Callable[[int, int], None]


def fit(
    program: Program, clusters: Sequence[Cluster], atoms: int, spare: int, watch: Watcher = lambda done, of: None
) -> list[Shared]:
    """Atoms for every cluster of several layers, and `spare` numbers for low rank where they lower the error most.

    With low rank, atoms and factors are fitted in turns, each to what the other leaves.
    """
    shared = [Shared.empty(cluster) for cluster in clusters]
    turns = TURNS if spare > 0 else 1
    for turn in range(turns):
        watch(turn, turns)
        for group in shared:
            group.refit(program, atoms)
        if spare > 0:
            _refine(program, shared, spare)
    watch(turns, turns)
    return shared


def _refine(program: Program, shared: Sequence[Shared], spare: int) -> None:
    """New factors for what the atoms leave."""
    layers = [(group.atoms, layer) for group in shared for layer in group.layers]
    gains = [_gains(program, atoms, layer) for atoms, layer in layers]
    ranks = allocate(gains, [sum(layer.member.layer.shape) for _, layer in layers], spare)
    for (atoms, layer), rank in zip(layers, ranks, strict=True):
        left, right = low_rank(_residual(program, atoms, layer), layer.member.whitening, rank)
        layer.factors = (left.float(), right.float()) if rank else None


def _residual(program: Program, atoms: Tensor, layer: Refined) -> Tensor:
    return program.weights[layer.member.layer.key].double() - layer.of_atoms(atoms)


def _gains(program: Program, atoms: Tensor, layer: Refined) -> Tensor:
    """What each direction of the whitened residual takes off the weighed error, falling."""
    values: Tensor = torch.linalg.svdvals(layer.member.whitening.apply(_residual(program, atoms, layer)))
    return layer.member.weight * values.square()
