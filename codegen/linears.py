"""Linear layers: groups over stored weights become one kernel step, a weight computed at run time a matrix product."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import fx

from sylvester.codegen.elementwise import call, pointwise
from sylvester.codegen.families import collapsed, matmul
from sylvester.codegen.formats import panel_bytes
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.layout import F32, PANEL, Format, Layout, plain
from sylvester.codegen.lazy import Buffer, Lazy, Linear, Pointer, RowNorm, Shape, as_strided, of_buffer
from sylvester.codegen.linear import FEW_ROWS, record_bytes
from sylvester.codegen.linear_groups import LinearGroup, bias_of, weight_of
from sylvester.codegen.lowering import Fact, Lowering, lowers, origin
from sylvester.codegen.quantized import LARGEST_DEPTH
from sylvester.codegen.scalar import Load
from sylvester.codegen.shapes import shape_of
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import binding, value

aten, dialect = torch.ops.aten, torch.ops.sylvester


def lower_group(lowering: Lowering, group: LinearGroup) -> dict[fx.Node, Lazy]:
    """One kernel step for the layers of a group; the result of each is a view of what it writes."""
    first = group.nodes[0]
    x = lowering.value_of(first.args[0])  # type: ignore[arg-type]
    if x.dtype != "f32":
        raise Unsupported(f"linear layers take float32, found {x.dtype}", at=first, hint="call `.float()` first")
    widths = [int(value(n).shape[-1]) for n in group.nodes]
    lead, k = x.shape[:-1], x.shape[-1]
    ways = len(widths) if group.interleaved else 1
    n = widths[0] if group.interleaved else sum(widths)
    _require_sums_that_fit(group, _number(k))
    outputs = [lowering.buffer("arena", (*lead, index(n)), "f32") for _ in range(ways)]
    norm = x.norm
    rows, stride = row_pointer(lowering, norm.x if norm else x)
    m, records = product(lead), None
    packs = norm is not None or not group.format.floats
    if packs and not (m.constant and m.constant <= FEW_ROWS):
        records = lowering.buffer("arena", (m, index(record_bytes(group.format, _number(k)))), "u8").name
    lowering.plan.steps.append(
        Linear(
            outputs=tuple(b.name for b in outputs),
            rows=rows,
            stride=stride,
            weight=lowering.weight(*stored_weight(group)).name,
            bias=_bias(lowering, group, widths),
            records=records,
            m=m,
            n=index(n),
            k=k,
            format=group.format,
            step=_step(lowering, group),
            norm=norm,
            parameters=_norm_parameters(lowering, norm),
            layers=len(group.nodes),
            label="; ".join(origin(node) for node in group.nodes),
        )
    )
    if group.interleaved:
        return {node: of_buffer(b) for node, b in zip(group.nodes, outputs, strict=True)}
    starts = accumulate(widths[:-1], initial=0)
    return {
        node: _columns(outputs[0], start, width) for node, start, width in zip(group.nodes, starts, widths, strict=True)
    }


def _columns(y: Buffer, start: int, width: int) -> Lazy:
    """y[..., start : start + width]."""
    whole = of_buffer(y)
    if y.shape[-1] == index(width):
        return whole
    return Lazy((*y.shape[:-1], index(width)), y.dtype, lambda i: whole.load([*i[:-1], i[-1] + start]))


def _number(n: Index) -> int:
    if n.constant is None:
        raise Unsupported("a linear layer with a symbolic number of input features has no lowering")
    return n.constant


def _require_sums_that_fit(group: LinearGroup, k: int) -> None:
    """Without groups one int32 holds a whole sum of int8 products."""
    if group.format.stored == Format("q8") and k > LARGEST_DEPTH:
        raise Unsupported(
            f"int8 weights with one scale per row take depths up to {LARGEST_DEPTH}, found {k}",
            at=group.nodes[0],
            hint="give columns scales in groups, such as Quantize(weights=8, group=128), or skip the weight",
        )


def stored_weight(group: LinearGroup) -> tuple[Layout, Shape, str]:
    """How the weights of a group are stored, with the shape and dtype of their buffer."""
    if group.format.strided:
        return strided_weight(group.weights[0], group.format.name, shape_of(value(weight_of(group.nodes[0]))))
    ways = len(group.nodes) if group.interleaved else 1
    layout = Layout("panels", group.weights, group.scales, format=group.format.stored, ways=ways)
    widths = [int(value(n).shape[-1]) for n in group.nodes]
    k = _number(shape_of(value(group.nodes[0].args[0]))[-1])  # type: ignore[arg-type]
    if group.format == F32:
        return layout, (index(sum(widths)), index(k)), "f32"
    panels = ways * -(-widths[0] // PANEL) if group.interleaved else -(-sum(widths) // PANEL)
    return layout, (index(panels), index(panel_bytes(group.format, k))), "u8"


def strided_weight(key: str, order: str, shape: Shape) -> tuple[Layout, Shape, str]:
    """A float32 weight as it is, or transposed for `order` "columns"."""
    return (Layout("columns", (key,)) if order == "columns" else plain(key)), shape, "f32"


def _bias(lowering: Lowering, group: LinearGroup, widths: list[int]) -> str | None:
    """The biases end to end, way after way; a layer without one gets zeros when another has one."""
    keys = tuple("" if (b := bias_of(n)) is None else binding(b).key for n in group.nodes)
    if not any(keys):
        return None
    layout = Layout("plain", keys) if len(keys) == 1 else Layout("joined", keys, lengths=tuple(widths))
    return lowering.weight(layout, (index(sum(widths)),), "f32").name


def _step(lowering: Lowering, group: LinearGroup) -> str | None:
    return None if group.step is None else lowering.weight(plain(group.step), (index(1),), "f32").name


def _norm_parameters(lowering: Lowering, norm: RowNorm | None) -> tuple[str | None, str | None]:
    def stored(x: Lazy | None) -> str | None:
        return None if x is None else lowering.contiguous(x).name

    return (None, None) if norm is None else (stored(norm.weight), stored(norm.bias))


def row_pointer(lowering: Lowering, x: Lazy) -> tuple[Pointer, Index]:
    """x [..., k] as rows of unit-stride features: where they start and how far apart they are."""
    view = as_strided(x)
    if view is not None and view.strides[-1] == index(1):
        stride = collapsed(view.strides[:-1], x.shape[:-1])
        if stride is not None:
            return Pointer(view.buffer, view.offset), stride
    return Pointer(lowering.contiguous(x).name, index(0)), x.shape[-1]


@lowers(aten.linear.default)
def linear(lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None) -> Lazy:
    """y = x w^T + b with a weight that is computed at run time or a vector, or a bias that broadcasts."""
    panels = _panels(lowering, weight)
    if panels is not None:
        return _over_panels(lowering, fact, x, panels, bias)
    turned = (
        weight if len(weight.shape) == 1 else Lazy(weight.shape[::-1], weight.dtype, lambda i: weight.load(i[::-1]))
    )
    joined = matmul(lowering, fact, x, turned)
    return joined if bias is None else pointwise(fact, lambda a, b: call("add", a, b), joined, bias)


def _panels(lowering: Lowering, weight: Lazy) -> Buffer | None:
    """The weight computed at run time, when it lies in panels."""
    element = weight.probe[1]
    buffer = lowering.plan.buffers[element.buffer] if isinstance(element, Load) else None
    return buffer if buffer is not None and buffer.packed and buffer.kind == "arena" else None


def _over_panels(lowering: Lowering, fact: Fact, x: Lazy, panels: Buffer, bias: Lazy | None) -> Lazy:
    """The kernel of stored weights over those that an earlier step made."""
    n, k = fact.shape[-1], x.shape[-1]
    y, norm = lowering.buffer("arena", fact.shape, fact.dtype), x.norm
    rows, stride = row_pointer(lowering, norm.x if norm else x)
    m, records = product(x.shape[:-1]), None
    whole = bias is not None and bias.shape == (n,)
    if norm is not None and not (m.constant and m.constant <= FEW_ROWS):
        records = lowering.buffer("arena", (m, index(record_bytes(F32, _number(k)))), "u8").name
    lowering.plan.steps.append(
        Linear(
            outputs=(y.name,),
            rows=rows,
            stride=stride,
            weight=panels.name,
            bias=lowering.contiguous(bias).name if bias is not None and whole else None,
            records=records,
            m=m,
            n=n,
            k=k,
            format=F32,
            norm=norm,
            parameters=_norm_parameters(lowering, norm),
        )
    )
    found = of_buffer(y)
    return found if bias is None or whole else pointwise(fact, lambda a, b: call("add", a, b), found, bias)


@lowers(dialect.linear_bf16.default, dialect.linear_w8.default, dialect.linear_w4.default, dialect.linear_w3.default)
def low_bit_linear(lowering: Lowering, fact: Fact, *_: object, **__: object) -> Lazy:
    raise Unsupported(
        "a low-bit linear layer needs a stored weight, and if any a stored bias of all its rows and a stored step [1]"
    )
