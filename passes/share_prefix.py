"""attention(q, K, V, past) -> attention(q, K, V, past, shared): all rows of a batch read the first keys of row 0.

A beginning that all prompts of a batch have in common is then kept once, and read once for the whole batch (Juravsky et
al., Hydragen, 2024). With `shared` 0 nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sylvester.compiler.cache_ops import UPDATES, attention_q
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding
from sylvester.compiler.quantized_ops import ATTENTIONS, attention_int8
from sylvester.compiler.runner import SHARED

READERS = frozenset({*ATTENTIONS, attention_q.target})


@dataclass(frozen=True)
class SharePrefix(Pass):
    """Adds the input `shared` to every entry that reads caches, or to none of them.

    Caches must be of a symbolic batch and read by attention alone, so that a row needs none of its own.
    """

    name: ClassVar[str] = "share-prefix"
    contract: ClassVar[Contract] = "exact"

    def requires(self, program: Program) -> None:
        if not program.state:
            raise Unsupported(f"no entry has caches, found {list(program.entries)}", hint="derive-decode")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for refusal in _refusals(program):
            changes.refuse("prefix", refusal, "caches")
            return changes
        for entry in program.entries.values():
            readers = [node for node in entry.calls(*READERS) if node.args[4] is not None]
            if not readers:
                continue
            shared = entry.bind("input", SHARED, torch.zeros((), dtype=torch.int64))
            entry.examples.setdefault(SHARED, torch.tensor(0))
            for node in readers:
                node.update_kwarg("shared", shared)
                changes.apply("attention", node)
        return changes


def _refusals(program: Program) -> Iterator[Refusal]:
    for key, slot in program.state.items():
        if not isinstance(slot.shape[0], torch.SymInt):
            yield Refusal(f"the cache {key!r} is of a fixed batch of {slot.shape[0]}")
    for entry in program.entries.values():
        for node in entry.calls(attention_int8.target):
            if node.args[4] is not None:
                yield Refusal("products of int8 would round what the rows of a batch share, and nothing else", node)
        for node in entry.placeholders("state"):
            yield from _other_readers(entry, node)


def _other_readers(entry: Entry, cache: fx.Node) -> Iterator[Refusal]:
    """Whatever needs the cache of every row."""
    for update in cache.users:
        if update.op != "output" and update.target not in UPDATES:
            yield Refusal(f"%{update.name} reads the cache {binding(cache).key!r}, expected attention only", update)
            return
        for user in update.users:
            reads = user.target in READERS and update in user.args[1:3] and user.args[4] is not None
            if user.op != "output" and not reads:
                yield Refusal(f"%{user.name} reads the cache {binding(cache).key!r}, expected attention only", user)
