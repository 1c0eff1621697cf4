"""GPTQ: columns of a weight are rounded one after another, the rest makes up for the error that their inputs see.

Frantar et al. 2022: minimise |X W^T - X Q^T|^2 with H = 2 X^T X of the inputs X [rows, k]. The columns with the largest
diagonal of H go first; scales are those of the groups in storage order, found before ("static groups").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylvester.compiler.activations import matrix
from sylvester.compiler.errors import CompileError
from sylvester.compiler.quantization import Grid, Rounded, Scaling, require_format, round_weight

DAMPING = 0.01
"""Of the mean of the diagonal, added to it."""
RETRIES = 3
"""How often the damping grows tenfold before a factorisation is given up."""
BLOCK = 128
"""Columns whose errors are handed on within the block; the columns after it hear of all of them at once."""
ROWS_AT_ONCE = 1024


class Hessian:
    """2 X^T X [k, k] over all rows given to `add`: products of slices in float32, summed in float64."""

    def __init__(self, depth: int) -> None:
        self.sum = torch.zeros((depth, depth), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        for rows in matrix(x).detach().float().split(ROWS_AT_ONCE):
            self.sum.add_(rows.T @ rows, alpha=2)

    def prepared(self) -> Prepared:
        """Gives up the sum, as two such matrices are the most there is room for.

        Raises `CompileError` for a matrix that no damping makes positive definite.
        """
        h, self.sum = self.sum, torch.empty(0)
        diagonal = h.diagonal().clone()
        if not bool(diagonal.isfinite().all()):
            raise CompileError("the inputs of the layer are not finite on the calibration data")
        order = torch.argsort(diagonal, descending=True, stable=True)
        h = _permuted(h, order.flip(0))
        h.diagonal()[h.diagonal() == 0] = 1.0
        damping, added = DAMPING * float(diagonal.mean()), 0.0
        for _ in range(RETRIES):
            h.diagonal().add_(damping - added)
            lower, failed = torch.linalg.cholesky_ex(h)
            if not failed and bool(lower.diagonal().isfinite().all()):
                del h
                return Prepared(order, inverse(lower).flip(0, 1))
            damping, added = 10 * damping, damping
        raise CompileError(
            f"H + {added:.1e} I of the layer's inputs is not positive definite",
            hint="give more calibration data, or method='mse'",
        )


@dataclass(frozen=True)
class Prepared:
    """What every weight over the same inputs needs.

    `order` of the columns, and the upper triangular float32 `factor` U of the inverse H^-1 = U^T U, columns so ordered:
    U^-1 is the Cholesky factor of H with both axes turned around.
    """

    order: Tensor
    factor: Tensor


def _permuted(h: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in another order, some rows at a time."""
    found = torch.empty_like(h)
    for rows, place in zip(order.split(BLOCK), found.split(BLOCK), strict=True):
        place.copy_(h[rows][:, order])
    return found


def inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular float64 matrix, in float32, some columns at a time."""
    found = torch.zeros(lower.shape, dtype=torch.float32)
    for start in range(0, len(lower), BLOCK):
        unit = torch.eye(len(lower) - start, min(BLOCK, len(lower) - start), dtype=lower.dtype)
        found[start:, start : start + BLOCK] = torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False)
    return found


def round_gptq(weight: Tensor, prepared: Prepared, bits: int, group: int, scaling: Scaling) -> Rounded:
    """Weight [n, k] and the prepared inputs -> numbers and scales, stored as `round_weight` does."""
    grid, (n, k) = require_format(bits, group, weight.shape[1]), weight.shape
    packed, scales = round_weight(weight, bits, group, scaling)
    of_column = scales.repeat_interleave(group or k, 1)[:, :k]
    order, factor = prepared.order, prepared.factor
    numbers = torch.empty((k, n), dtype=torch.int8)
    rest = weight.float().T[order].contiguous()
    for start in range(0, k, BLOCK):
        block = slice(start, min(start + BLOCK, k))
        errors = torch.empty_like(rest[block])
        columns = order[block]
        numbers[columns] = _round_block(rest[block], errors, factor[block, block], of_column.T[columns], grid)
        rest[block.stop :] -= factor[block, block.stop :].T @ errors
    packed.copy_(grid.pack(numbers.T))
    return packed, scales


def _round_block(columns: Tensor, errors: Tensor, factor: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Columns [block, n] to whole numbers; `errors` are those divided by the diagonal of the factor."""
    whole = torch.empty(columns.shape, dtype=torch.int8)
    for i, scale in enumerate(scales):
        found = grid.nearest(columns[i], scale)
        whole[i] = found.to(torch.int8)
        errors[i] = (columns[i] - found * scale) / factor[i, i]
        columns[i + 1 :] -= torch.outer(factor[i, i + 1 :], errors[i])
    return whole
