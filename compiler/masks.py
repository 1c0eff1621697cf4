"""Recognise an attention mask by evaluating it: one that depends on sizes only is run and compared with bands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.changes import Refusal
from sylvester.compiler.ops import visible
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

aten = torch.ops.aten

HIDDEN = -1e9  # added to a score: a weight of exactly zero in float32 unless every key of the row is hidden
FACTORIES = {
    aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.ones_like.default,
    aten.zeros_like.default, aten.full_like.default, aten.empty_like.default,
}  # fmt: skip
SCALES = {
    aten.mul.Tensor, aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default, aten.floor_divide.Scalar,
}  # fmt: skip
SMALL = (2, 3, 7)
LEAST, MOST = 64, 8192
NO_BOUND = 1 << 31


@dataclass(frozen=True)
class Band:
    """The keys a query sees: those up to itself when causal, and the last `window` of them when window > 0."""

    causal: bool
    window: int


ALL = Band(causal=False, window=0)


def recognise(program: Program, entry: Entry, mask: fx.Node) -> Band | Refusal:
    """The band a mask node stands for at every size, or why it has to stay an operand.

    Evaluated at small sizes and at one where every number in its sub-graph shows, such as a window.
    """
    if value(mask).dim() < 2:
        return Refusal("the mask has no query axis", mask)
    nodes = size_only(mask)
    if isinstance(nodes, Refusal):
        return nodes
    largest = _evaluation_size(program, entry, mask, nodes)
    if largest > MOST:
        return Refusal(f"the mask must be evaluated at length {largest}, the limit is {MOST}", mask)
    try:
        grids = [evaluate(program, mask, nodes, *lengths) for lengths in _lengths(mask, largest)]
    except RuntimeError as error:
        return Refusal(f"the mask cannot be evaluated up to length {largest}: {error}", mask)
    band = _band_of(grids[0])
    if isinstance(band, Refusal):
        return Refusal(band.reason, mask)
    broadcast = any(n == 1 for n in value(mask).shape[-2:] if isinstance(n, int))
    if broadcast and band != ALL:
        return Refusal("the mask is the same for all queries or all keys", mask)
    for grid in grids:
        keys = _visible_keys(grid)
        if isinstance(keys, Refusal) or not torch.equal(keys, _grid(band, keys)):
            return Refusal("the mask is no band of positions", mask)
    return band


def _lengths(mask: fx.Node, largest: int) -> list[tuple[int, int]]:
    """(queries, keys) to evaluate at, the largest first; unequal ones when the two axes have sizes of their own."""
    queries, keys = (_symbols(n) for n in value(mask).shape[-2:])
    uneven = [] if queries == keys else [(3, 7), (7, 3)]
    return [(largest, largest), *((n, n) for n in SMALL if n < largest), *uneven]


def size_only(node: fx.Node) -> list[fx.Node] | Refusal:
    """The ancestors of a node in order, down to sizes and weights; a refusal when the content of an input matters."""
    order: dict[fx.Node, None] = {}
    stack = [(node, False)]
    while stack:
        current, done = stack.pop()
        if done:
            order[current] = None
        elif current in order or isinstance(value(current), (torch.SymInt, int)) or is_weight(current):
            continue
        elif current.op != "call_function":
            return Refusal(f"the mask depends on the {binding(current).kind} {binding(current).key}", node)
        else:
            stack += [(current, True), *((n, False) for n in _content_inputs(current))]
    return list(order)


def _content_inputs(node: fx.Node) -> list[fx.Node]:
    """Operands whose values matter; factories such as zeros_like read only the size of their first."""
    if node.target in FACTORIES:
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return node.all_input_nodes


def _evaluation_size(program: Program, entry: Entry, mask: fx.Node, nodes: list[fx.Node]) -> int:
    """Where every number in the sub-graph shows, capped by the longest input the program serves."""
    limits = [upper_bound(entry, s) for n in value(mask).shape[-2:] for s in _symbols(n)]
    if "max_length" in program.info:
        limits.append(int(program.info["max_length"]))
    return min([showing_size(program, nodes), *limits])


def showing_size(program: Program, nodes: list[fx.Node]) -> int:
    """A length beyond every number that `nodes` and their weights compare with, times what they scale positions by."""
    weights = {n for node in nodes for n in node.all_input_nodes if is_weight(n)}
    compared = [x for n in nodes for x in _numbers((n.args, dict(n.kwargs)))]
    compared += [float(x) for w in weights for x in _extremes(program.weights[binding(w).key])]
    scales = [abs(x) for n in nodes if n.target in SCALES for x in _numbers(n.args[1:]) if x]
    stretch = math.prod(max(x, 1 / x) for x in scales if x < -HIDDEN)
    return LEAST + math.ceil(stretch * max((abs(x) for x in compared if abs(x) < -HIDDEN), default=0))


def _extremes(weight: Tensor) -> list[Any]:
    """The smallest and largest finite number of a weight; booleans and complex numbers are compared with none."""
    if weight.dtype == torch.bool or weight.is_complex():
        return []
    finite = weight[weight.abs() < -HIDDEN]
    return [finite.min().item(), finite.max().item()] if finite.numel() else []


def _numbers(x: Any) -> list[float]:
    if isinstance(x, (list, tuple)):
        return [n for y in x for n in _numbers(y)]
    if isinstance(x, dict):
        return [n for y in x.values() for n in _numbers(y)]
    return [x] if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else []


def _symbols(size: Any) -> set[sympy.Symbol]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def upper_bound(entry: Entry, symbol: sympy.Symbol) -> int:
    environment = entry.fake_mode.shape_env
    bound = environment.var_to_range[symbol].upper if environment else sympy.oo
    return int(bound) if bound.is_finite and bound < NO_BOUND else NO_BOUND


def evaluate(program: Program, mask: fx.Node, nodes: list[fx.Node], queries: int, keys: int) -> Tensor:
    """The mask with query and key axes of these lengths and every other size 2."""
    axes = zip(value(mask).shape[-2:], (queries, keys), strict=True)
    sizes = {s: length for size, length in axes for s in _symbols(size)}
    done: dict[fx.Node, Any] = {}

    def read(n: fx.Node) -> Any:
        if n in done:
            return done[n]
        if is_weight(n):
            return program.weights[binding(n).key]
        fact = value(n)
        if isinstance(fact, Tensor):
            return torch.zeros([_size(d, sizes) for d in fact.shape], dtype=fact.dtype)
        return _size(fact, sizes)

    with torch.no_grad():
        for node in nodes:
            done[node] = node.target(*map_arg(node.args, read), **map_arg(dict(node.kwargs), read))  # type: ignore[operator]
    result: Tensor = done[mask] if mask in done else read(mask)
    return result


def _size(val: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    if not isinstance(val, torch.SymInt):
        return int(val)
    expression = val.node.expr
    return int(expression.subs({s: sizes.get(s, 2) for s in expression.free_symbols}))


def _visible_keys(grid: Tensor) -> Tensor | Refusal:
    """Boolean [queries, keys] of a bool or additive mask that is the same for every batch row and head."""
    flat = grid.reshape(-1, *grid.shape[-2:])
    if not (flat == flat[0]).all():
        return Refusal("the mask differs between batch rows or heads")
    first = flat[0]
    if first.dtype == torch.bool:
        return first
    if not ((first == 0) | (first <= HIDDEN)).all():
        return Refusal("the mask adds values other than 0 and minus infinity")
    return first == 0


def _band_of(grid: Tensor) -> Band | Refusal:
    """The only band that the last and the first row allow."""
    keys = _visible_keys(grid)
    if isinstance(keys, Refusal):
        return keys
    queries, length = keys.shape
    window = int(keys[-1].sum())
    causal = length > 1 and not bool(keys[0, -1])
    return Band(causal, window if window < min(queries, length) else 0)


def _grid(band: Band, like: Tensor) -> Tensor:
    return visible(like.shape[0], like.shape[1], 0, band.causal, band.window, like.device)
