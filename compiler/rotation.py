"""Orthogonal changes of basis of a feature axis: randomised Hadamard matrices, or random ones where none is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sylvester.compiler import hadamard

VALUES_AT_ONCE = 1 << 22
EXACT = 1 << 26
"""Weights with more values are rotated along one axis at a time with float32 between."""


@dataclass(frozen=True)
class Rotation:
    """x -> (x s) H^T on every `width` features, in blocks of `block`; or x -> x Q^T with a random orthogonal Q.

    `signs`: the seed of s in {-1, 1}^width, None for no signs. `random`: the seed of Q, used instead of H.
    """

    width: int
    block: int
    signs: int | None = None
    random: int | None = None

    @staticmethod
    def hadamard(width: int, seed: int | None = None) -> Rotation:
        """The largest Hadamard matrices whose order divides the width, with signs if there is a seed."""
        return Rotation(width, hadamard.largest_block(width), seed)

    @staticmethod
    def offline(width: int, seed: int) -> Rotation:
        """A randomised Hadamard matrix of the whole width, or a random orthogonal one where none is known."""
        whole = hadamard.largest_block(width) == width
        return Rotation(width, width, seed) if whole else Rotation(width, width, random=seed)

    @property
    def trivial(self) -> bool:
        """Nothing is mixed."""
        return self.block == 1 or self.width == 1

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """Rotate one axis, every `width` neighbours, in the dtype of x."""
        moved = x.movedim(axis, -1)
        rows = moved.reshape(-1, self.width)
        if self.random is not None:
            rows = rows @ self.matrix.to(rows.dtype).T
        else:
            rows = rows if self.signs is None else rows * self.sign_vector.to(rows.dtype)
            rows = hadamard.transform(rows, self.block)
        return rows.reshape(moved.shape).movedim(-1, axis)

    @cached_property
    def sign_vector(self) -> Tensor:
        """s, float32 [width]."""
        return torch.randint(0, 2, (self.width,), generator=_generator(self.signs)).float() * 2 - 1

    @cached_property
    def matrix(self) -> Tensor:
        """Q, float64 [width, width]: uniform over orthogonal matrices (Mezzadri, 2007)."""
        normal = torch.randn(self.width, self.width, generator=_generator(self.random), dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        matrix: Tensor = q * r.diagonal().sign()
        return matrix

    def __str__(self) -> str:
        if self.random is not None:
            return f"random orthogonal matrix of order {self.width}"
        kind = "Hadamard matrix" if self.signs is None else "randomised Hadamard matrix"
        blocks = "" if self.block == self.width else f" in {self.width // self.block} blocks"
        return f"{kind} of order {self.block}{blocks} = {hadamard.scheme(self.block)}"


def rotated(weight: Tensor, steps: list[tuple[int, Rotation]]) -> Tensor:
    """The weight with its axes rotated in turn, in float64, cast back once; memory is bounded by slices."""
    middle = torch.float64 if weight.numel() <= EXACT else weight.dtype
    for number, (axis, rotation) in enumerate(steps):
        last = number == len(steps) - 1
        weight = _along(weight, axis, rotation, torch.float32 if last else middle)
    return weight


def _along(weight: Tensor, axis: int, rotation: Rotation, dtype: torch.dtype) -> Tensor:
    result = torch.empty(weight.shape, dtype=dtype)
    if weight.dim() == 1:
        return result.copy_(rotation.apply(weight.double()))
    other = 1 if axis == 0 else 0
    size = max(1, VALUES_AT_ONCE * weight.shape[other] // max(1, weight.numel()))
    for new, old in zip(result.split(size, other), weight.split(size, other), strict=True):
        new.copy_(rotation.apply(old.double(), axis))
    return result


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(seed or 0)
