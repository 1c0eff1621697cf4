"""Weights that are sums of atoms: computed before the linear layers that read them, in panels where rows fill these."""

from __future__ import annotations

import torch
from torch import fx

from sylvester.codegen.elementwise import call, pointwise
from sylvester.codegen.families import matmul
from sylvester.codegen.index import flatten, index
from sylvester.codegen.layout import PANEL, Layout
from sylvester.codegen.lazy import Buffer, Indices, Lazy, Shape, Store, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Expr, Load
from sylvester.compiler.calls import arguments
from sylvester.compiler.program import Program, binding, is_weight, value
from sylvester.compiler.shared_ops import combine as op

LINEAR = torch.ops.aten.linear.default
UNROLLED = 16
"""So many atoms are summed in one expression; more are a reduction."""


def atom_layouts(program: Program) -> dict[str, tuple[Layout, Shape, str]]:
    """Atoms that are stored in panels one after another, as linear layers over their sums read them."""
    found: dict[str, tuple[Layout, Shape, str]] = {}
    for entry in program.entries.values():
        for node in entry.placeholders("weight"):
            if node.users and all(_in_panels(user, node) for user in node.users):
                count, n, k = (int(size) for size in value(node).shape)
                key = binding(node).key
                found[key] = Layout("panels", (key,)), (index(count * n), index(k)), "f32"
    return {key: stored for key, stored in found.items() if all(u.target is op.target for u in program.users(key))}


def _in_panels(node: fx.Node, atoms: fx.Node) -> bool:
    """Whether a node sums these atoms, for linear layers only."""
    if node.target is not op.target or arguments(node)["atoms"] is not atoms or not is_weight(atoms):
        return False
    fact = value(atoms)
    static = all(isinstance(size, int) for size in fact.shape) and fact.dtype == torch.float32
    readers = all(u.target is LINEAR and u.args[1] is node and u.args[0] is not node for u in node.users)
    whole = static and fact.shape[0] <= UNROLLED and fact.shape[1] % PANEL == 0
    return bool(whole and readers and arguments(node)["left"] is None)


@lowers(op.target)
def combine(
    lowering: Lowering,
    fact: Fact,
    atoms: Lazy,
    coefficients: Lazy,
    left: Lazy | None = None,
    right: Lazy | None = None,
    resident: bool = False,
) -> Lazy:
    if len(atoms.shape) == 2:
        return of_buffer(_in_place_of_stored(lowering, fact, atoms, coefficients))
    total = summed(lowering, fact, atoms, coefficients)
    if left is None or right is None:
        return lowering.realize(total)
    product = matmul(lowering, fact, left, right)
    return lowering.realize(pointwise(fact, lambda a, b: call("add", a, b), total, product))


def _in_place_of_stored(lowering: Lowering, fact: Fact, atoms: Lazy, coefficients: Lazy) -> Buffer:
    """The sum in panels, from atoms in panels: a matrix [n, k] as [n / 32, k, 32]."""
    source = atoms.probe[1]
    assert isinstance(source, Load), "atoms in panels are stored"
    n, k = (size.constant or 0 for size in fact.shape)
    count = (atoms.shape[0].constant or 0) // n
    panels = (index(n // PANEL), index(k), index(PANEL))
    made = lowering.buffer("arena", fact.shape, fact.dtype, layout=Layout("panels", ("sum",)))

    def make(i: Indices) -> Expr:
        return _added([_term(coefficients, s, Load(source.buffer, flatten(i, panels) + s * n * k, "f32"))
                       for s in range(count)])  # fmt: skip

    lowering.plan.steps.append(Store(made.name, panels, fact.dtype, make, lambda i: flatten(i, panels)))
    return made


def summed(lowering: Lowering, fact: Fact, atoms: Lazy, coefficients: Lazy) -> Lazy:
    """The sum of atoms [count, n, k] that are no panels."""
    count = atoms.shape[0].constant
    if count is None or count > UNROLLED:
        return lowering.reduce(
            "sum", fact.shape, atoms.shape[:1], fact.dtype,
            lambda o, i: call("mul", coefficients.load(i), atoms.load([*i, *o])),
        )  # fmt: skip
    terms = range(count)
    return Lazy(
        fact.shape, fact.dtype,
        lambda i: _added([_term(coefficients, s, atoms.load([index(s), *i])) for s in terms]),
    )  # fmt: skip


def _term(coefficients: Lazy, s: int, element: Expr) -> Expr:
    return call("mul", coefficients.load([index(s)]), element)


def _added(terms: list[Expr]) -> Expr:
    total = terms[0]
    for term in terms[1:]:
        total = call("add", total, term)
    return total
