"""start(tokens) -> start(tokens, padding): select(x, last) -> select(x, last - padding).

The last `padding` tokens of a call are then none: causal attention hides them from those before, and whatever is read
next is written over them in the caches. Prompts of many lengths become calls of few sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import sympy
import torch
from torch import Tensor, fx

from sylvester.compiler.buckets import PADDED
from sylvester.compiler.cache_ops import UPDATES, attention_q
from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.ops import attention
from sylvester.compiler.parallel_ops import all_reduce
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.positions import Positions, token_axes
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.quantized_ops import attention_bf16, attention_int8
from sylvester.compiler.runner import PADDING
from sylvester.compiler.skip_ops import add_unless, layers_to_skip, update_unless
from sylvester.compiler.stages import DECODE, stages_of
from sylvester.compiler.token_axis import mixes

aten = torch.ops.aten
PREFILL, START = "prefill", "start"
CAUSAL = frozenset({attention.target, attention_bf16.target, attention_q.target})
DECIDING = frozenset({add_unless.target, layers_to_skip.target, update_unless.target})


@dataclass(frozen=True)
class PadPrompt(Pass):
    """Adds the input `padding` to `start`, and lets `info` say that prompts may be padded; or neither.

    What is computed of a token must not depend on those after it, in any entry that reads prompts.
    """

    name: ClassVar[str] = "pad-prompt"
    contract: ClassVar[Contract] = "exact"

    def requires(self, program: Program) -> None:
        if PREFILL not in program.entries or not program.state:
            raise Unsupported(f"no entry {PREFILL!r} with caches, found {list(program.entries)}", hint="derive-decode")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        if program.info.get(PADDED):
            return changes
        first = START if START in program.entries else PREFILL
        for refusal in _refusals(program, first):
            changes.refuse("padding", refusal, "tokens")
            return changes
        program.info[PADDED] = True
        for node in _choose_last(program.entries[START]) if first == START else ():
            changes.apply("last", node)
        return changes


def _refusals(program: Program, first: str) -> Iterator[Refusal]:
    stages = [stage.entry for stage in stages_of(program.info)]
    if stages != [DECODE]:
        yield Refusal(f"{stages} take turns in reading, and need not write the same caches")
    for name in (first, *stages):
        entry = program.entries[name]
        size = value(_tokens(entry)).shape[1]
        if not isinstance(size, torch.SymInt):
            yield Refusal(f"{name!r} takes {size} tokens, expected any number", _tokens(entry))
            continue
        positions = Positions(program, entry, size.node.expr)
        for node in entry.calls():
            if refusal := _looks_ahead(node, positions):
                yield refusal


def _tokens(entry: Entry) -> fx.Node:
    return next(n for n in entry.placeholders("input") if value(n).ndim > 1)


def _looks_ahead(node: fx.Node, positions: Positions) -> Refusal | None:
    """Why what is computed of a token may depend on tokens after it."""
    if node.target in DECIDING:
        return Refusal(f"{node.target} leaves parts out where all tokens of a call do", node)
    if node.target is all_reduce.target:
        return Refusal("sums over ranks are no part of a larger launch, so that equal sizes gain nothing", node)
    if node.target is attention_int8.target:
        return Refusal("products of int8 round by means over tokens that a token does not see", node)
    if node.target in CAUSAL:
        return _not_causal(node)
    if node.target is operator.getitem or not isinstance(value(node), Tensor | tuple | list):
        return None
    placed = node in positions.offsets or node in positions.constant
    known = placed or _writes(node) or _takes_last(node, positions.symbol)
    return None if known else mixes(node, positions.symbol)


def _not_causal(node: fx.Node) -> Refusal | None:
    given = arguments(node)
    if not given["causal"] or given["depths"] is not None:
        return Refusal("an attention is not causal", node)
    alike = given["mask"] is None or value(given["mask"]).shape[-2] == 1
    return None if alike else Refusal("a mask differs from token to token", node)


def _writes(node: fx.Node) -> bool:
    """Rows of tokens into a cache, at their positions."""
    return node.target in UPDATES and cast(fx.Node, node.args[0]).op == "placeholder"


def _takes_last(node: fx.Node, symbol: sympy.Symbol) -> bool:
    if node.target is not aten.select.int:
        return False
    x, axis, place = cast("tuple[fx.Node, int, Any]", node.args)
    return token_axes(value(x), symbol) == [axis % value(x).ndim] and place == -1


def _choose_last(entry: Entry) -> list[fx.Node]:
    """Selects the last token that is one in place of the last; returns what was replaced."""
    symbol = value(_tokens(entry)).shape[1].node.expr
    found = [node for node in entry.calls(aten.select.int) if _takes_last(node, symbol)]
    place = _place(entry)
    for node in found:
        options: dict[str, Any] = {"before": node, "made_by": PadPrompt.name}
        rows = entry.emit(aten.index_select.default, *node.args[:2], place, **options)
        entry.replace(node, entry.emit(aten.select.int, rows, node.args[1], 0, **options))
    return found


def _place(entry: Entry) -> fx.Node:
    """int64 [1]: length - 1 - padding."""
    padding = entry.bind("input", PADDING, torch.zeros((), dtype=torch.int64))
    entry.examples.setdefault(PADDING, torch.tensor(0))
    options: dict[str, Any] = {"before": entry.calls()[0], "made_by": PadPrompt.name}
    length = entry.emit(aten.sym_size.int, _tokens(entry), 1, **options)
    last = entry.emit(aten.select.int, entry.emit(aten.arange.default, length, **options), 0, -1, **options)
    return entry.emit(aten.reshape.default, entry.emit(aten.sub.Tensor, last, padding, **options), [1], **options)
