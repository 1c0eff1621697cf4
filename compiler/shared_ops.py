"""The dialect op of shared weights: a matrix that is a sum of atoms which several layers read."""

from __future__ import annotations

import torch
from torch import Tensor

from sylvester.compiler.ops import Cost, op


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _combine_cost(
    atoms: Tensor,
    coefficients: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    resident: bool = False,
) -> Cost:
    values = atoms.shape[1] * atoms.shape[2]
    rank = 0 if left is None else left.shape[1]
    written = values * atoms.element_size()
    return Cost(2 * values * (atoms.shape[0] + rank), _nbytes(atoms, coefficients, left, right) + written)


def _combine_fact(atoms: Tensor, *_: object, **__: object) -> Tensor:
    return atoms.new_empty(atoms.shape[1:])


@op(
    cost=_combine_cost,
    fact=_combine_fact,
    examples=(
        ((3, 5, 7), (3,)),
        ((1, 40, 33), (1,), None, None, True),
        ((2, 33, 8), (2,), (33, 3), (3, 8), True),
        ((40, 3, 4), (40,), (3, 1), (1, 4)),
    ),
)
def combine(
    atoms: Tensor,
    coefficients: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    resident: bool = False,
) -> Tensor:
    """sum over s of coefficients[s] atoms[s], plus left right: [S, n, k], [S], [n, r], [r, k] -> [n, k] (MASA, 2025).

    `resident` allows a backend to make the matrix once, when an artefact is loaded, instead of at every call.
    """
    if (left is None) != (right is None):
        raise ValueError("combine takes both low-rank factors or none")
    total: Tensor = torch.tensordot(coefficients, atoms, 1)
    return total if left is None or right is None else total + left @ right
