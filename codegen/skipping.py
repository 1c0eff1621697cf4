"""Ops of parts that are skipped: for how many layers a token skips them, sums and caches without them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sylvester.codegen.branches import sum_unless
from sylvester.codegen.elementwise import call, choose, is_test
from sylvester.codegen.index import index
from sylvester.codegen.lazy import Indices, Lazy, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.reads import step_writes
from sylvester.codegen.scalar import Constant, Expr, cast
from sylvester.compiler.errors import Unsupported

dialect = torch.ops.sylvester


@lowers(dialect.add_unless.default)
def add_unless(_: Lowering, fact: Fact, x: Lazy, part: Lazy, left: Lazy) -> Lazy:
    """Where nothing but the sum is in the branch: x, or x + part."""
    return Lazy(fact.shape, fact.dtype, sum_unless(x, part, left))


@lowers(dialect.update_unless.default, bf16=True)
def update_unless(lowering: Lowering, fact: Fact, cache: Lazy, updated: Lazy, left: Lazy) -> Lazy:
    """Nothing to do for a cache: the update wrote it in place, or was left out with its branch."""
    buffer = lowering.whole(updated)
    if buffer is None or buffer != lowering.whole(cache):
        return Lazy(fact.shape, fact.dtype, lambda i: choose(_skips(left), cache.load(i), updated.load(i)))
    if not all(step.guard for step in lowering.plan.steps if buffer.name in step_writes(step)):
        raise Unsupported("a cache is kept by an update that runs although its part is skipped")
    return updated


def _skips(left: Lazy) -> Expr:
    """left [1, 1] > 0."""
    return is_test("gt", cast(left.load([index(0), index(0)]), "f32"), Constant(0.0, "f32"))


@lowers(dialect.layers_to_skip.default)
def layers_to_skip(
    lowering: Lowering, fact: Fact, before: Lazy, after: Lazy, left: Lazy | None, threshold: float, run: float
) -> Lazy:
    """before . after >= threshold |before| |after|, from three sums over each row."""
    before, after = (of_buffer(replace(lowering.kept(x), shape=x.shape)) for x in (before, after))

    def total(a: Lazy, b: Lazy) -> Lazy:
        inner = a.shape[-1:]
        return lowering.reduce(
            "sum", fact.shape, inner, "f32", lambda o, i: call("mul", a.load([*o, *i]), b.load([*o, *i]))
        )

    dot, first, second = total(before, after), total(before, before), total(after, after)
    zero, one = Constant(0.0, "f32"), Constant(1.0, "f32")

    def load(i: Indices) -> Expr:
        norms = call("sqrt", call("mul", first.load(i), second.load(i)))
        saturated = is_test("ge", dot.load(i), call("mul", Constant(float(threshold), "f32"), norms))
        found = choose(saturated, Constant(float(run), "f32"), zero)
        if left is None:
            return found
        return choose(is_test("gt", left.load(i), zero), call("sub", left.load(i), one), found)

    return lowering.realize(Lazy(fact.shape, fact.dtype, load))
