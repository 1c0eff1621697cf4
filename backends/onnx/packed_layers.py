"""Linear layers that read one value, run as one: the rows of their weights behind each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import onnx_ir as ir
import torch
from torch import fx

from sylvester.backends.onnx.builder import Builder, Operand
from sylvester.backends.onnx.low_bit import LINEARS, Packed, block_forms, matmul_nbits
from sylvester.backends.onnx.products import only_rows
from sylvester.backends.onnx.weights import Form
from sylvester.compiler.forms import arguments
from sylvester.compiler.program import binding, is_weight

LINEAR = torch.ops.aten.linear.default


def packed(b: Builder, layers: Sequence[fx.Node]) -> ir.Value | None:
    """Their results side by side along the last axis; None where they cannot run as one."""
    if any(layer in b.values or layer not in b.later for layer in layers) or not _alike(b, layers):
        return None
    x = b.operand(cast(fx.Node, layers[0].args[0]))
    if layers[0].target is LINEAR:
        weights = [b.operand(cast(fx.Node, layer.args[1])) for layer in layers]
        name = "+".join(f"{w.key}.transposed" for w in weights)
        stored = b.joined(name, lambda: torch.cat([b.program.weights[w.key] for w in weights]).t())
        return b.call("MatMul", x.value, stored)
    return _of_blocks(b, x.value, layers)


def _of_blocks(b: Builder, x: ir.Value, layers: Sequence[fx.Node]) -> ir.Value | None:
    """One MatMulNBits."""
    parts = [_weight(b, layer) for layer in layers]
    rows = arguments(layers[0])[4]
    if len({(p.k, p.groups, p.bits) for p in parts}) > 1 or not parts[0].in_blocks(rows):
        return None
    numbers, scales = zip(*(block_forms(p) for p in parts), strict=True)
    stored = _joined(b, [p.numbers for p in parts], numbers), _joined(b, [p.scales for p in parts], scales)
    return matmul_nbits(b, x, parts[0], stored[0], stored[1], None, rows, sum(p.n for p in parts))


def _joined(b: Builder, weights: Sequence[Operand], forms: Sequence[Form]) -> ir.Value:
    """Rows of all weights, each in its form."""
    pairs = list(zip(weights, forms, strict=True))
    name = "+".join(f"{w.key}.{form.name}" for w, form in pairs)
    return b.joined(name, lambda: torch.cat([form.make(b.program.weights[w.key]) for w, form in pairs]))


def _weight(b: Builder, layer: fx.Node) -> Packed:
    numbers, scales = (b.operand(cast(fx.Node, n)) for n in layer.args[1:3])
    return Packed(numbers, scales, LINEARS[layer.target])


def _alike(b: Builder, layers: Sequence[fx.Node]) -> bool:
    """Whether they have one kind, one input, no bias and no step, and weights that are read equally often."""
    first = layers[0]
    if first.target is not LINEAR and first.target not in LINEARS:
        return False
    forms = [arguments(layer) for layer in layers]
    plain = 3 if first.target is not LINEAR else 2
    if any(f[plain] is not None or (plain == 3 and f[5] is not None) for f in forms):
        return False
    same = all(layer.target is first.target and f[0] is forms[0][0] for layer, f in zip(layers, forms, strict=True))
    same = same and len({f[4] for f in forms if plain == 3}) <= 1
    return same and all(is_weight(f[1]) and only_rows(b, b.operand(f[1])) for f in forms) and _counts(b, forms)


def _counts(b: Builder, forms: Sequence[tuple[object, ...]]) -> bool:
    keys = [binding(cast(fx.Node, f[1])).key for f in forms]
    return len({len(b.program.users(b.program.weights.resolve(key))) for key in keys}) == 1
