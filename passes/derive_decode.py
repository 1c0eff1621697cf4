"""forward(tokens) -> prefill(tokens), which also stores keys and values, and decode(tokens, past), which reads them.

attention(q, k, v, causal) -> attention(q, kv_update(K, k, past), kv_update(V, v, past), past), and
arange(length) + c -> arange(length) + c + past where it is the position of a token. A bias per key becomes a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sylvester.compiler import ops
from sylvester.compiler.causal_lm import CausalLM, analyse, chunked_error
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.check import ROUNDED, rounds
from sylvester.compiler.errors import ContractBroken, Unsupported
from sylvester.compiler.key_bias import NAME, key_bias, stored
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.positions import token_axes
from sylvester.compiler.program import Entry, Output, Program, StateSlot, binding, fake_empty, value

aten = torch.ops.aten

PAST, CHUNK = 5, 3
"""Sizes of the decode example."""
TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 1e-2}
TIGHT = 1e-4


@dataclass(frozen=True)
class DeriveDecode(Pass):
    """Entries `prefill` and `decode` in place of a causal LM's `forward`, over the same weights.

    Caches hold `max_length` positions: the option, else `info["max_length"]`, else what the position tables hold.
    With `check`, decoding in chunks is compared with one prefill.
    """

    name: ClassVar[str] = "derive-decode"
    contract: ClassVar[Contract] = "exact"
    max_length: int = 0
    check: bool = True

    def requires(self, program: Program) -> None:
        found = analyse(program)
        if isinstance(found, Refusal):
            raise Unsupported(f"not a causal language model: {found.reason}", at=found.at)
        capacity = self._capacity(program, found)
        for mask in found.biases:
            if isinstance(bias := key_bias(program, mask, capacity), Refusal):
                raise Unsupported(f"no caches of {capacity} positions with this bias: {bias.reason}", at=mask)

    def run(self, program: Program) -> Changes:
        model = cast(CausalLM, analyse(program))
        capacity = self._capacity(program, model)
        program.info["max_length"] = capacity
        forward = program.entries.pop("forward")
        program.state |= _slots(program, model, capacity)
        program.entries |= {"prefill": forward.clone(), "decode": forward.clone()}
        _write_caches(program, program.entries["prefill"], model)
        _read_caches(program, program.entries["decode"], model)
        program.sweep()
        changes = Changes()
        for node in model.attention:
            changes.apply("attention", node)
        for node in (*_read_by_others(model.positions), *model.rows):
            changes.apply("position", node)
        if self.check:
            _self_check(program, model)
        return changes

    def _capacity(self, program: Program, model: CausalLM) -> int:
        wanted = self.max_length or int(program.info.get("max_length") or model.limit or 0)
        if not wanted:
            hint = "set DeriveDecode(max_length=...)"
            raise Unsupported("the longest sequence is unknown: no `max_length` and no position table", hint=hint)
        stated = program.info.get("max_length")
        if stated and wanted > stated:
            hint = f"set DeriveDecode(max_length={stated}) or less"
            raise Unsupported(f"max_length is {wanted}, the model takes at most {stated} tokens", hint=hint)
        if model.limit is not None and wanted > model.limit:
            hint = f"set DeriveDecode(max_length={model.limit}) or less"
            raise Unsupported(f"max_length is {wanted}, the position table holds {model.limit}", hint=hint)
        example = program.entries["forward"].examples.get(binding(model.tokens).key)
        if example is not None and example.shape[1] > wanted:
            hint = "trace with a shorter example"
            raise Unsupported(f"max_length is {wanted}, the example has {example.shape[1]} tokens", hint=hint)
        return wanted


def _slots(program: Program, model: CausalLM, capacity: int) -> dict[str, StateSlot]:
    """k0, v0, k1, v1, ...: each [batch, kv heads, capacity, features]."""
    slots: dict[str, StateSlot] = {}
    for i, node in enumerate(model.attention):
        for letter, operand in zip("kv", node.args[1:3], strict=True):
            fact: Tensor = value(cast(fx.Node, operand))
            shape = (fact.shape[0], fact.shape[1], capacity, fact.shape[3])
            slots[f"{letter}{i}"] = StateSlot(len(slots), shape, fact.dtype)
    return slots


def _write_caches(program: Program, entry: Entry, model: CausalLM) -> None:
    """Keys and values go to the front of the caches; attention still reads them fresh."""
    first = entry.calls()[0]
    zero = entry.emit(aten.full.default, [], 0, before=first, made_by="derive-decode", dtype=torch.int64)
    for mask, bias in _bound_biases(program, entry, model).items():
        length = entry.emit(aten.sym_size.int, _named(entry, model.tokens), 1, before=first, made_by="derive-decode")
        cut = entry.emit(aten.slice.Tensor, bias, 3, 0, length, before=first, made_by="derive-decode")
        for node in _attention(entry, model):
            node.replace_input_with(mask, cut)
    updates = [update for node in _attention(entry, model) for update in _update(program, entry, node, zero)]
    _add_state_outputs(program, entry, updates)


def _read_caches(program: Program, entry: Entry, model: CausalLM) -> None:
    nodes: dict[str, fx.Node] = {n.name: n for n in entry.graph.nodes}
    capacity = int(program.state["k0"].shape[2])
    past = entry.bind("input", "past", torch.zeros((), dtype=torch.int64))
    tokens = nodes[model.tokens.name]
    positions = {nodes[old.name]: offset for old, offset in model.positions.items()}
    for node, users in _read_by_others(positions).items():
        new = _position(entry, node, positions[node], tokens, past)
        for user in users:
            user.replace_input_with(node, new)
    for old, start in model.rows.items():
        _look_up(entry, nodes[old.name], start, tokens, past)
    biases = _bound_biases(program, entry, model)
    updates = []
    for node in _attention(entry, model):
        keys, values = _update(program, entry, node, past)
        updates += [keys, values]
        args = (node.args[0], keys, values, biases.get(cast(fx.Node, node.args[3])), past, *node.args[5:])
        entry.replace(node, entry.emit(ops.attention.target, *args, before=node, made_by="derive-decode"))
    _add_state_outputs(program, entry, updates)
    example = entry.examples[binding(tokens).key]
    chunk = min(CHUNK, capacity)
    repeated = example.repeat(1, -(-chunk // example.shape[1]))[:, :chunk]
    entry.examples = {binding(tokens).key: repeated, "past": torch.tensor(min(PAST, capacity - chunk))}


def _bound_biases(program: Program, entry: Entry, model: CausalLM) -> dict[fx.Node, fx.Node]:
    """For each bias in `entry` a weight with the bias of every key of the cache, which equal ones share."""
    bound = {}
    for mask in model.biases:
        bias = cast(Tensor, key_bias(program, mask, int(program.state["k0"].shape[2]))).contiguous()
        key = next((k for k in stored(program) if program.weights[k].equal(bias)), program.weights.fresh(NAME))
        program.weights[key] = bias
        bound[_named(entry, mask)] = entry.bind("weight", key, bias)
    return bound


def _named(entry: Entry, node: fx.Node) -> fx.Node:
    """What a node of the original is in a clone."""
    found: fx.Node = next(n for n in entry.graph.nodes if n.name == node.name)
    return found


def _attention(entry: Entry, model: CausalLM) -> list[fx.Node]:
    names = [n.name for n in model.attention]
    return [n for n in entry.calls(ops.attention.target) if n.name in names]


def _update(program: Program, entry: Entry, node: fx.Node, past: fx.Node) -> list[fx.Node]:
    """The two caches of an attention with its new keys and values written at `past`."""
    made = []
    index = sum(1 for n in entry.calls(ops.kv_update.target)) // 2
    for letter, operand in zip("kv", node.args[1:3], strict=True):
        key = f"{letter}{index}"
        slot = program.state[key]
        cache = entry.bind("state", key, fake_empty(entry.fake_mode, slot.shape, slot.dtype))
        made.append(entry.emit(ops.kv_update.target, cache, operand, past, before=node, made_by="derive-decode"))
    return made


def _add_state_outputs(program: Program, entry: Entry, updates: list[fx.Node]) -> None:
    entry.graph.output_node().args = ((*entry.results(), *updates),)
    entry.outputs += [Output("state", key) for key in program.state]


def _arange(entry: Entry, offset: int, tokens: fx.Node, past: fx.Node, before: fx.Node) -> fx.Node:
    """int64 [length]: past + offset + 0, 1, 2, ..."""
    options: dict[str, Any] = {"before": before, "made_by": "derive-decode"}
    length = entry.emit(aten.sym_size.int, tokens, 1, **options)
    position = entry.emit(aten.add.Tensor, entry.emit(aten.arange.default, length, **options), past, **options)
    return entry.emit(aten.add.Tensor, position, offset, **options) if offset else position


def _read_by_others(positions: Mapping[fx.Node, int]) -> dict[fx.Node, list[fx.Node]]:
    """Positions with their users that are no positions themselves."""
    users = {node: [u for u in node.users if u not in positions] for node in positions}
    return {node: others for node, others in users.items() if others}


def _position(entry: Entry, node: fx.Node, offset: int, tokens: fx.Node, past: fx.Node) -> fx.Node:
    """What `node` is for the tokens after `past`, in the shape and type of `node`."""
    fact: Tensor = value(node)
    options: dict[str, Any] = {"before": node, "made_by": "derive-decode"}
    new = _arange(entry, offset, tokens, past, node)
    if fact.dtype != torch.int64:
        new = entry.emit(aten.to.dtype, new, fact.dtype, **options)
    batch, length = value(tokens).shape
    axis = token_axes(fact, length.node.expr)[0]
    if fact.ndim > 1:
        new = entry.emit(aten.reshape.default, new, [-1 if d == axis else 1 for d in range(fact.ndim)], **options)
    if all(n == 1 for d, n in enumerate(fact.shape) if d != axis):
        return new
    sizes: list[Any] = [-1 if d == axis else n for d, n in enumerate(fact.shape)]
    for d, n in enumerate(sizes):
        if isinstance(n, torch.SymInt):
            source = (tokens, 0) if statically_known_true(n == batch) else (node, d)
            sizes[d] = entry.emit(aten.sym_size.int, *source, **options)
    return entry.emit(aten.expand.default, new, sizes, **options)


def _look_up(entry: Entry, node: fx.Node, start: int, tokens: fx.Node, past: fx.Node) -> None:
    """table[start : start + length] -> the rows of the table at the positions of the tokens."""
    table, dim = node.args[0], node.args[1]
    rows = _arange(entry, start, tokens, past, node)
    entry.replace(node, entry.emit(aten.index_select.default, table, dim, rows, before=node, made_by="derive-decode"))


def _self_check(program: Program, model: CausalLM) -> None:
    """Decoding in chunks computes what one prefill does."""
    example = program.entries["prefill"].examples.get(binding(model.tokens).key)
    if example is None:
        return
    capacity = int(program.state["k0"].shape[2])
    length = min(max(example.shape[1], PAST + CHUNK + 1), capacity)
    tokens = example.repeat(1, -(-length // example.shape[1]))[:, :length]
    chunks = (1,) if length == 1 else (length - 1, 1) if length < PAST else (2, 1, length - 3)
    error = chunked_error(program, tokens, chunks)
    allowed = max(TOLERANCE.get(program.state["k0"].dtype, TIGHT), ROUNDED if rounds(program) else 0.0)
    if not error <= allowed:
        raise ContractBroken(f"decoding in chunks differs from one pass by {error:.1e}, expected at most {allowed:.0e}")
