"""Is a program a causal language model that can decode token by token? Every condition is checked on the graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sylvester.compiler import ops
from sylvester.compiler.changes import Refusal
from sylvester.compiler.key_bias import key_bias, most_keys, only_for
from sylvester.compiler.masks import NO_BOUND, upper_bound
from sylvester.compiler.positions import Positions, has, token_axes
from sylvester.compiler.program import Entry, Program, binding, value
from sylvester.compiler.token_axis import LOOK_UPS, mixes

aten = torch.ops.aten
SHORT = 64
"""Keys at which the bias of a mask is looked at."""


@dataclass(frozen=True)
class CausalLM:
    """The parts of a causal LM's `forward`: tokens [batch, length], attention in order, positions with their offsets.

    `positions` are arange(length) + offset, `rows` slices [start, start + length) of a weight. `limit` is the number of
    positions that the tables hold, None without tables. `biases` are masks that add a number per position of the key.
    """

    tokens: fx.Node
    symbol: sympy.Symbol
    attention: tuple[fx.Node, ...]
    positions: dict[fx.Node, int]
    rows: dict[fx.Node, int]
    limit: int | None
    biases: tuple[fx.Node, ...] = ()


def analyse(program: Program) -> CausalLM | Refusal:
    """The parts of `forward`, or the first reason why it cannot be decoded token by token."""
    if "forward" not in program.entries:
        return Refusal(f"there is no entry 'forward', the program has {list(program.entries)}")
    entry = program.entries["forward"]
    tokens = _tokens(entry)
    if isinstance(tokens, Refusal):
        return tokens
    symbol = value(tokens).shape[1].node.expr
    attention = entry.calls(ops.attention.target)
    biases, bound = _masks(attention), upper_bound(entry, symbol)
    refusal = (
        _attention(entry, attention, tokens) or _biases(program, biases, min(SHORT, bound)) or _outputs(entry, tokens)
    )
    if refusal:
        return refusal
    hidden = only_for(biases, set(attention))
    positions = Positions(program, entry, symbol)
    offsets = {node: offset for node, offset in positions.offsets.items() if node not in hidden}
    rows = {node: start for node, start in positions.table_rows().items() if node not in hidden}
    given = offsets.keys() | positions.constant | rows.keys() | set(attention) | hidden
    for node in entry.calls():
        if node in given or node.target is operator.getitem or not isinstance(value(node), Tensor | tuple | list):
            continue
        refusal = _unplaced(node, positions, symbol) or mixes(node, symbol)
        if refusal:
            return refusal
    limits = [*_limits(offsets, rows), *(most for mask in biases if (most := most_keys(mask, bound)) < NO_BOUND)]
    return CausalLM(tokens, symbol, tuple(attention), offsets, rows, min(limits, default=None), biases)


def _tokens(entry: Entry) -> fx.Node | Refusal:
    inputs = entry.placeholders("input")
    if len(inputs) != 1:
        return Refusal(f"there are {len(inputs)} inputs {[binding(n).key for n in inputs]}, expected token ids only")
    fact: Any = value(inputs[0])
    if fact.ndim != 2 or fact.dtype != torch.int64:
        return Refusal(f"the input is {fact.dtype}{list(fact.shape)}, expected int64 [batch, length]", inputs[0])
    if not isinstance(fact.shape[1], torch.SymInt) or not isinstance(fact.shape[1].node.expr, sympy.Symbol):
        return Refusal(f"the length is fixed at {fact.shape[1]}, expected a symbolic one", inputs[0])
    return inputs[0]


def _attention(entry: Entry, nodes: list[fx.Node], tokens: fx.Node) -> Refusal | None:
    if left := entry.calls(aten.scaled_dot_product_attention.default):
        return Refusal("an attention was not raised to the dialect", left[0])
    if not nodes:
        return Refusal("there is no attention")
    batch, length = value(tokens).shape
    for node in nodes:
        q, k, v, _, past, _, causal = node.args[:7]
        if past is not None:
            return Refusal("an attention has a cache", node)
        if not causal:
            return Refusal("an attention is not causal", node)
        for operand in (q, k, v):
            fact: Any = value(operand)  # type: ignore[arg-type]
            if not _same(fact.shape[0], batch) or not _same(fact.shape[2], length):
                expected = f"expected batch {batch} and length {length}"
                return Refusal(f"an attention works on {list(fact.shape)}, {expected}", node)
            if not all(isinstance(n, int) for n in (fact.shape[1], fact.shape[3])):
                return Refusal("an attention has a symbolic number of heads or features", node)
    return None


def _masks(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(cast(fx.Node, node.args[3]) for node in nodes if node.args[3] is not None))


def _biases(program: Program, masks: Sequence[fx.Node], length: int) -> Refusal | None:
    """Every mask adds a number per position of the key."""
    for mask in masks:
        found = key_bias(program, mask, length)
        if isinstance(found, Refusal):
            return Refusal(f"an attention has a mask that is no bias per key: {found.reason}", mask)
    return None


def _outputs(entry: Entry, tokens: fx.Node) -> Refusal | None:
    """One float result [batch, length, vocabulary] at least."""
    batch, length = value(tokens).shape
    for node in entry.results():
        fact = value(node)
        if fact.ndim == 3 and fact.is_floating_point() and _same(fact.shape[0], batch) and _same(fact.shape[1], length):
            return None
    return Refusal(f"no result is a float [{batch}, {length}, vocabulary]")


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _unplaced(node: fx.Node, positions: Positions, symbol: sympy.Symbol) -> Refusal | None:
    """A value with a token axis that comes from sizes but from no position: a table read some other way."""
    fact = value(node)
    sources = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
    fresh = not any(has(n, symbol) for source in sources for n in value(source).shape)
    if node in positions.free and isinstance(fact, Tensor) and any(has(n, symbol) for n in fact.shape) and fresh:
        return Refusal("a value depends on the number of tokens but is no position", node)
    return None


def _limits(positions: dict[fx.Node, int], rows: dict[fx.Node, int]) -> list[int]:
    """Positions that each table holds."""
    limits = [_rows(node, node.args[1]) - start for node, start in rows.items()]
    for node, offset in positions.items():
        for user in node.users:
            if user.target in LOOK_UPS:
                limits.append(_rows(user, _looked_up_axis(user, node)) - offset)
    return limits


def _looked_up_axis(node: fx.Node, index: fx.Node) -> Any:
    """The axis of the table that `index` counts along."""
    if node.target is aten.index_select.default:
        return node.args[1]
    return cast("list[Any]", node.args[1]).index(index) if node.target is aten.index.Tensor else 0


def _rows(node: fx.Node, dim: Any) -> int:
    """The size of the table that a call reads, along an axis."""
    return int(value(cast(fx.Node, node.args[0])).shape[dim])


def chunked_error(program: Program, tokens: Tensor, chunks: tuple[int, ...]) -> float:
    """Largest relative error of a prefill of the first chunk and decoding of the others, against one prefill of all."""
    name = binding(program.entry("prefill").placeholders("input")[0]).key
    empty = {
        key: torch.zeros([tokens.shape[0], int(slot.shape[1]), tokens.shape[1], int(slot.shape[3])], dtype=slot.dtype)
        for key, slot in program.state.items()
    }
    prefill = program.entry("prefill")
    symbol = value(prefill.placeholders("input")[0]).shape[1].node.expr
    results = zip(prefill.outputs, prefill.results(), strict=True)
    outputs = {o.name: token_axes(value(n), symbol) for o, n in results if o.kind == "output"}
    whole = program.run("prefill", {name: tokens}, empty)
    parts, state, past = [], empty, 0
    for i, size in enumerate(chunks):
        given = {name: tokens[:, past : past + size]} | ({"past": torch.tensor(past)} if i else {})
        found = program.run("decode" if i else "prefill", given, state)
        state = {key: found[key] for key in program.state}
        parts.append(found)
        past += size
    return max(_parted_error(whole[key], [part[key] for part in parts], axis, past) for key, axis in outputs.items())


def _parted_error(whole: Tensor, parts: list[Tensor], axes: list[int], tokens: int) -> float:
    """Parts hold the tokens one after the other; without a token axis every part is the whole."""
    if not axes:
        return max(_error(whole, part) for part in parts)
    return _error(whole.narrow(axes[0], 0, tokens), torch.cat(parts, axes[0]))


def _error(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
