"""kv_update(K: f32, k) -> kv_update(K: bf16, k): caches of keys and values hold bfloat16, attention reads them so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from sylvester.compiler.calls import resized
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding, value
from sylvester.compiler.quantized_ops import ATTENTIONS

SHORT = torch.bfloat16


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Half the bytes of every cache. Entries that write caches without reading them compute what they did."""

    name: ClassVar[str] = "quantize-cache"
    contract: ClassVar[Contract] = "lossy"

    def run(self, program: Program) -> Changes:
        changes = Changes()
        if not program.state:
            changes.refuse("cache", Refusal("the program has no caches"), "state")
        for key, slot in program.state.items():
            refusal = _refusal(program, key)
            if refusal:
                changes.refuse("cache", refusal, key)
                continue
            program.state[key] = replace(slot, dtype=SHORT)
            for entry in program.entries.values():
                _shorten(entry, key)
            changes.apply("cache", key)
        return changes


def _refusal(program: Program, key: str) -> Refusal | None:
    """Only attention may read the cache, as keys or values."""
    if program.state[key].dtype != torch.float32:
        return Refusal(f"the cache holds {program.state[key].dtype}, expected torch.float32")
    for entry in program.entries.values():
        for node in _updates(entry, key):
            for user in node.users:
                if user.op != "output" and not (user.target in ATTENTIONS and node in user.args[1:3]):
                    return Refusal(f"%{user.name} reads the cache, expected attention only", user)
    return None


def _updates(entry: Entry, key: str) -> list[fx.Node]:
    return [user for node in entry.placeholders("state") if binding(node).key == key for user in node.users]


def _shorten(entry: Entry, key: str) -> None:
    """The facts of a slot and of its updates."""
    for update in _updates(entry, key):
        for node in (update.args[0], update):
            node.meta["val"] = resized(value(node), value(node).shape, SHORT)  # type: ignore[union-attr, arg-type]
