"""attention(q, kv_update(K, k), kv_update(V, v)) -> attention_q(q, kv_update_q(K, k), kv_update_q(V, v))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import fx

from sylvester.compiler.cache_ops import BITS, attention_q, kv_update_q, record_bytes
from sylvester.compiler.calls import arguments, parameters, resized
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.ops import kv_update
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, StateSlot, binding, fake_empty, value
from sylvester.compiler.quantized_ops import ATTENTIONS

SHORT = torch.bfloat16


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Keys and values in bfloat16, or in records of 8- or 4-bit numbers that attention reads (compiler/cache_ops.py).

    Entries that write caches without reading them compute what they did.
    """

    name: ClassVar[str] = "quantize-cache"
    contract: ClassVar[Contract] = "lossy"
    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (16, *BITS):
            raise ValueError(f"bits is {self.bits!r}, expected one of {(16, *BITS)}")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        if not program.state:
            changes.refuse("cache", Refusal("the program has no caches"), "state")
        refusals = _refusals(program, self.bits)
        for key, slot in program.state.items():
            if key in refusals:
                changes.refuse("cache", refusals[key], key)
                continue
            program.state[key] = _smaller(slot, self.bits)
            for entry in program.entries.values():
                _write(entry, key, program.state[key], self.bits)
            changes.apply("cache", key)
            changes.note(_sizes(slot, program.state[key]))
        if self.bits in BITS:
            for entry in program.entries.values():
                _read(entry, self.bits)
        return changes


def _refusals(program: Program, bits: int) -> dict[str, Refusal]:
    """Why slots are left; keys and values of one attention are both records or none."""
    found = {key: refusal for key in program.state if (refusal := _refusal(program, key, bits))}
    count = -1
    while bits in BITS and count != len(found):
        count = len(found)
        for keys, node in _read_together(program):
            if None in keys or any(key in found for key in keys):
                reason = "the other operand of its attention is no such cache, expected keys and values alike"
                found |= {key: Refusal(reason, node) for key in keys if key and key not in found}
    return found


def _refusal(program: Program, key: str, bits: int) -> Refusal | None:
    """Only attention may read the cache, as keys or values; records must be smaller than rows."""
    slot = program.state[key]
    if slot.dtype != torch.float32:
        return Refusal(f"the cache holds {slot.dtype}, expected torch.float32")
    width = slot.shape[-1]
    if bits in BITS and (not isinstance(width, int) or record_bytes(width, bits) >= 4 * width):
        return Refusal(f"a record is not smaller than a row of {width} float32 features")
    for entry in program.entries.values():
        for node in _updates(entry, key):
            for user in node.users:
                if user.op != "output" and not (user.target in ATTENTIONS and node in user.args[1:3]):
                    return Refusal(f"%{user.name} reads the cache, expected attention only", user)
                if bits in BITS and user.op != "output" and (reason := _unlike(user)):
                    return Refusal(reason, user)
    return None


def _unlike(node: fx.Node) -> str:
    """Why an attention cannot read records: its features differ or it is no float32."""
    q, v = (value(cast(fx.Node, node.args[n])) for n in (0, 2))
    if q.dtype != torch.float32:
        return f"it computes in {q.dtype}, expected torch.float32"
    keys, values = q.shape[-1], v.shape[-1]
    return "" if keys == values else f"keys and values have {keys} and {values} features, expected as many of each"


def _updates(entry: Entry, key: str) -> list[fx.Node]:
    return [user for node in entry.placeholders("state") if binding(node).key == key for user in node.users]


def _read_together(program: Program) -> Iterator[tuple[list[str | None], fx.Node]]:
    """The slots of keys and values of every attention over a cache; None where one is not a cache."""
    for entry in program.entries.values():
        for node in entry.calls(*ATTENTIONS):
            keys = [_slot(cast(fx.Node, operand)) for operand in node.args[1:3]]
            if any(keys):
                yield keys, node


def _slot(node: fx.Node) -> str | None:
    """The slot that an update writes."""
    cache = node.args[0] if node.target is kv_update.target else None
    if isinstance(cache, fx.Node) and cache.op == "placeholder" and binding(cache).kind == "state":
        return binding(cache).key
    return None


def _smaller(slot: StateSlot, bits: int) -> StateSlot:
    if bits not in BITS:
        return replace(slot, dtype=SHORT)
    width = record_bytes(int(slot.shape[-1]), bits)
    return replace(slot, dtype=torch.uint8, shape=(*slot.shape[:-1], width))


def _write(entry: Entry, key: str, slot: StateSlot, bits: int) -> None:
    """The slot and its updates in the new type."""
    for update in _updates(entry, key):
        cache = cast(fx.Node, update.args[0])
        if bits not in BITS:
            for node in (cache, update):
                node.meta["val"] = resized(value(node), value(node).shape, SHORT)
            continue
        cache.meta["val"] = fake_empty(entry.fake_mode, slot.shape, slot.dtype)
        args: Any = (*update.args, bits)
        entry.replace(update, entry.emit(kv_update_q.target, *args, before=update, made_by=QuantizeCache.name))
        entry.graph.erase_node(update)


def _read(entry: Entry, bits: int) -> None:
    """Attention over records."""
    for node in entry.calls(*ATTENTIONS):
        if cast(fx.Node, node.args[1]).target is kv_update_q.target:
            given, declared = arguments(node), parameters(node.target)
            args = [given[p.name] for p in declared if not p.keyword_only]
            named: dict[str, Any] = {**node.kwargs, "before": node, "made_by": QuantizeCache.name}
            entry.replace(node, entry.emit(attention_q.target, *args, bits, **named))


def _sizes(old: StateSlot, new: StateSlot) -> str:
    before, after = (int(slot.shape[-1]) * slot.dtype.itemsize for slot in (old, new))
    return f"a row of {old.shape[-1]} features takes {after} bytes instead of {before}"
