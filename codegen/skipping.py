"""Ops of parts that some tokens skip: the mask of the tokens that go on, and a sum over them."""

from __future__ import annotations

import torch

from sylvester.codegen.branches import sum_where
from sylvester.codegen.elementwise import call, choose, is_test
from sylvester.codegen.lazy import Indices, Lazy, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr

dialect = torch.ops.sylvester


@lowers(dialect.add_where.default)
def add_where(_: Lowering, fact: Fact, x: Lazy, part: Lazy, active: Lazy) -> Lazy:
    """Where nothing but the sum is in the branch: x + part, or x."""
    return Lazy(fact.shape, fact.dtype, sum_where(x, part, active))


@lowers(dialect.unsaturated.default)
def unsaturated(lowering: Lowering, fact: Fact, before: Lazy, after: Lazy, active: Lazy | None, bound: float) -> Lazy:
    """before . after < bound |before| |after|, from three sums over each row."""
    before, after = (of_buffer(lowering.kept(x)) for x in (before, after))

    def total(a: Lazy, b: Lazy) -> Lazy:
        inner = a.shape[-1:]
        return lowering.reduce(
            "sum", fact.shape, inner, "f32", lambda o, i: call("mul", a.load([*o, *i]), b.load([*o, *i]))
        )

    dot, first, second = total(before, after), total(before, before), total(after, after)
    one, zero = Constant(1.0, "f32"), Constant(0.0, "f32")

    def load(i: Indices) -> Expr:
        norms = call("sqrt", call("mul", first.load(i), second.load(i)))
        goes_on = is_test("lt", dot.load(i), call("mul", Constant(float(bound), "f32"), norms))
        found = choose(goes_on, one, zero)
        return found if active is None else choose(is_test("gt", active.load(i), zero), found, zero)

    return lowering.realize(Lazy(fact.shape, fact.dtype, load))
