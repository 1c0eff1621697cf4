"""Weights that are sums of atoms, where nothing better is known: computed before what reads them."""

from __future__ import annotations

import torch

from sylvester.codegen.elementwise import call, pointwise
from sylvester.codegen.families import matmul
from sylvester.codegen.index import Index, index
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Expr

UNROLLED = 16
"""So many atoms are summed in one expression; more are a reduction."""


@lowers(torch.ops.sylvester.combine.default)
def combine(
    lowering: Lowering,
    fact: Fact,
    atoms: Lazy,
    coefficients: Lazy,
    left: Lazy | None = None,
    right: Lazy | None = None,
    resident: bool = False,
) -> Lazy:
    total = _sum(lowering, fact, atoms, coefficients)
    if left is None or right is None:
        return lowering.realize(total)
    product = matmul(lowering, fact, left, right)
    return lowering.realize(pointwise(fact, lambda a, b: call("add", a, b), total, product))


def _sum(lowering: Lowering, fact: Fact, atoms: Lazy, coefficients: Lazy) -> Lazy:
    def term(s: Index, i: Indices) -> Expr:
        return call("mul", coefficients.load([s]), atoms.load([s, *i]))

    count = atoms.shape[0].constant
    if count is None or count > UNROLLED:
        return lowering.reduce("sum", fact.shape, atoms.shape[:1], fact.dtype, lambda o, i: term(i[0], o))

    def unrolled(i: Indices) -> Expr:
        total = term(index(0), i)
        for s in range(1, count):
            total = call("add", total, term(index(s), i))
        return total

    return Lazy(fact.shape, fact.dtype, unrolled)
