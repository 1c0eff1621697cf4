"""sparse_glu and sparse_linear -> kernels that skip rows of their weights; which weights lie so that rows are whole."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha1

import torch

from sylvester.codegen import sparse
from sylvester.codegen.conv2d import Finish
from sylvester.codegen.elementwise import call, choose, is_test, pointwise, value_of
from sylvester.codegen.epilogue import in_place
from sylvester.codegen.index import index, product
from sylvester.codegen.layout import Layout
from sylvester.codegen.lazy import Buffer, Extern, Indices, Lazy, Pointer, Shape, Store, of_buffer
from sylvester.codegen.linear_groups import strided_weights
from sylvester.codegen.linears import row_pointer, strided_weight
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr, Load
from sylvester.compiler.program import Program

dialect = torch.ops.sylvester
LINEAR = "sv_sparse_linear"


@lowers(dialect.zero_small.default)
def zero_small(_: Lowering, fact: Fact, x: Lazy, level: Lazy) -> Lazy:
    return pointwise(
        fact,
        lambda a, t: choose(is_test("le", call("abs", a), t), Constant(0.0, "f32"), a),
        x,
        level,
    )


@lowers(dialect.sparse_glu.default)
def sparse_glu(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    weight: Lazy,
    bias: Lazy | None,
    gate: Lazy,
    thresholds: Lazy,
    activation: str,
) -> Lazy:
    (rows, stride), (gates, gate_stride) = row_pointer(lowering, x), row_pointer(lowering, gate)
    stored = [None if o is None else lowering.contiguous(o) for o in (weight, bias, thresholds)]
    y = lowering.buffer("arena", fact.shape, "f32")
    name = f"sv_sparse_glu_{activation}"
    w, b, t = (None if o is None else Pointer(o.name, index(0)) for o in stored)
    m, n, k = product(fact.shape[:-1]), fact.shape[-1], x.shape[-1]
    lowering.extern(
        Extern(
            name,
            sparse.sparse_glu(name, activation),
            (Pointer(y.name, index(0)), rows, w, b, gates, t, m, n, k, stride, gate_stride),
            writes=(y.name,),
            reads=(rows.buffer, gates.buffer, *(o.name for o in stored if o is not None)),
            work=m * n * k,
            formats=("rows",),
        )
    )
    return of_buffer(y)


@lowers(dialect.sparse_linear.default)
def sparse_linear(lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None) -> Lazy:
    rows, stride = row_pointer(lowering, x)
    w, b = _transposed(lowering, weight), None if bias is None else lowering.contiguous(bias)
    m, n, k = product(fact.shape[:-1]), fact.shape[-1], x.shape[-1]
    y = lowering.buffer("arena", fact.shape, "f32")
    sums = lowering.buffer("arena", (sparse.sum_floats(m.constant, n),), "f32")
    step = Extern(
        LINEAR,
        sparse.sparse_linear(LINEAR),
        (
            Pointer(y.name, index(0)),
            rows,
            Pointer(w.name, index(0)),
            None if b is None else Pointer(b.name, index(0)),
            Pointer(sums.name, index(0)),
            *(m, n, k, stride),
        ),
        writes=(y.name, sums.name),
        reads=(rows.buffer, w.name, *([] if b is None else [b.name])),
        work=m * n * k,
        scratch=(f"{LINEAR}_scratch", (k,)),
        bytes=(m * (n + k) + k * sparse.padded(n)) * 4,
        formats=("columns",),
    )
    lowering.extern(replace(step, finished=lambda store: _finished(lowering, y.name, store)))
    return of_buffer(y)


def strided_layouts(program: Program) -> dict[str, tuple[Layout, Shape, str]]:
    """How the weights are stored that a kernel skips rows of, by key."""
    orders = strided_weights(program)
    return {key: strided_weight(key, order, _sizes(program, key)) for key, order in orders.items()}


def _sizes(program: Program, key: str) -> Shape:
    return tuple(index(n) for n in program.weights[key].shape)


def by_columns(lowering: Lowering, weight: Lazy) -> Buffer | None:
    """The buffer of a weight that is stored by columns."""
    element = weight.probe[1]
    found = lowering.plan.buffers[element.buffer] if isinstance(element, Load) else None
    turned = found is not None and found.layout is not None and found.layout.kind == "columns"
    return found if turned and found is not None and found.shape == weight.shape else None


def _transposed(lowering: Lowering, weight: Lazy) -> Buffer:
    """The buffer of a weight that is stored by columns, else a copy that lies like one."""
    found = by_columns(lowering, weight)
    if found is not None:
        return found
    n, k = weight.shape
    zero = Constant(0.0, "f32")

    def turned(i: Indices) -> Expr:
        inside = is_test("lt", value_of(i[1]), value_of(n))
        return choose(inside, weight.load([i[1] % n, i[0]]), zero)

    return lowering.contiguous(Lazy((k, sparse.padded(n)), "f32", turned))


def _finished(lowering: Lowering, result: str, store: Store) -> Extern:
    """The call that writes `result`, with the elementwise work of `store` in it."""
    step = next(s for s in lowering.plan.steps if isinstance(s, Extern) and s.writes[0] == result)
    value, others = in_place(store, result)
    name = f"{LINEAR}_{sha1(value.encode()).hexdigest()[:8]}"
    return replace(
        step,
        function=name,
        source=sparse.sparse_linear(name, Finish(value, len(others))),
        arguments=(
            Pointer(store.buffer, index(0)), *step.arguments[1:], *(Pointer(b, index(0)) for b in others),
        ),
        writes=(store.buffer, *step.writes[1:]),
        reads=(*step.reads, *others),
        scratch=(f"{name}_scratch", (step.scratch or ("", ()))[1]),
        finished=None,
        label="; ".join(label for label in (step.label, store.label) if label),
    )  # fmt: skip
