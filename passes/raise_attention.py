"""softmax(softcap(q kᵀ scale) + mask) v, written out or as one call -> attention(q, k, v, mask, scale, causal, ...)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sylvester.compiler import ops
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.masks import Band, recognise
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.rewrite import Rule, inherited, rewrite
from sylvester.passes.attention_masks import joined, split_mask
from sylvester.passes.attention_parts import Attention, from_call, from_softmax
from sylvester.passes.repeated_heads import unrepeated

aten = torch.ops.aten


class WrittenSoftmax(Rule):
    """exp(x) / sum(exp(x)) over the last axis."""

    example = ((2, 3, 8),)

    @staticmethod
    def before(x: Tensor) -> Tensor:
        weights = torch.exp(x)
        return weights / weights.sum(-1, keepdim=True)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Every attention becomes one op over un-repeated keys and values; masks of positions become flags."""

    name: ClassVar[str] = "raise-attention"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        changes = rewrite(program, (WrittenSoftmax(),))
        for entry in program.entries.values():
            raiser = Raiser(program, entry, changes)
            for node in entry.calls(aten.scaled_dot_product_attention.default):
                raiser.settle(node, from_call(node))
            for node in entry.calls(aten.softmax.int, aten._softmax.default):
                raiser.settle(node, from_softmax(entry, node))
        return changes


class Raiser:
    """Works on one entry; layers share what is known of a mask and the facts of equal attentions."""

    def __init__(self, program: Program, entry: Entry, changes: Changes) -> None:
        self.program = program
        self.entry = entry
        self.changes = changes
        self.parts: dict[fx.Node, list[Band | fx.Node]] = {}
        self.facts: dict[object, Any] = {}

    def settle(self, node: fx.Node, found: Attention | Refusal | None) -> None:
        """Replace one attention, or note why not."""
        if isinstance(found, Attention):
            found = self._with_shared_heads(found)
        if isinstance(found, Attention):
            found = self._replace(self._without_bands(found))
        if isinstance(found, Refusal):
            self.changes.refuse("attention", found, node)

    def _with_shared_heads(self, found: Attention) -> Attention | Refusal:
        """The attention with un-repeated heads, or why its operands are none of the op's."""
        ranks = {value(n).dim() for n in (found.q, found.k, found.v)}
        if ranks not in ({3}, {4}):
            return Refusal(f"operands have {sorted(ranks)} axes, expected batch, heads, tokens, features", found.out)
        if ranks == {3}:
            return found
        emit = partial(self.entry.emit, before=found.out, made_by=RaiseAttention.name)
        k, v = unrepeated(emit, found.k), unrepeated(emit, found.v)
        if value(k).shape[1] != value(v).shape[1]:
            k, v = found.k, found.v
        heads, key_heads = value(found.q).shape[1], value(k).shape[1]
        if value(k).shape[1] != value(v).shape[1] or not isinstance(key_heads, int) or heads % key_heads:
            return Refusal(f"{heads} query heads do not share {key_heads} key heads evenly", found.out)
        return replace(found, k=k, v=v)

    def _without_bands(self, found: Attention) -> Attention:
        """Masks of positions become the causal flag and the window; other masks stay, with the reason noted once."""
        parts = [part for mask in found.masks for part in self._parts(mask)]
        bands = [Band(found.causal, 0), *(part for part in parts if isinstance(part, Band))]
        kept = tuple(part for part in parts if isinstance(part, fx.Node))
        windows = [band.window for band in bands if band.window]
        return replace(found, masks=kept, causal=any(band.causal for band in bands), window=min(windows, default=0))

    def _parts(self, mask: fx.Node) -> list[Band | fx.Node]:
        """A mask as a band, or as the bands and masks it is a sum or an intersection of."""
        if mask in self.parts:
            return self.parts[mask]
        band = recognise(self.program, self.entry, mask)
        if isinstance(band, Band):
            self.parts[mask] = [band]
            return [band]
        pieces = split_mask(self.entry, mask)
        found = [part for piece in pieces for part in self._parts(piece)]
        if not any(isinstance(part, Band) for part in found):
            self.changes.refuse("mask", band, mask)
            found = [mask]
        self.parts[mask] = found
        return found

    def _replace(self, found: Attention) -> Refusal | None:
        new = self._build(found)
        old, fact = value(found.out), value(new)
        if fact.dtype != old.dtype or list(map(str, fact.shape)) != list(map(str, old.shape)):
            found_text, old_text = (f"{x.dtype}{list(x.shape)}" for x in (fact, old))
            return Refusal(f"would give {found_text}, the graph has {old_text}", found.out)
        self.changes.apply("attention", found.out)
        self.entry.replace(found.out, new)
        return None

    def _build(self, found: Attention) -> fx.Node:
        """Emit the op in front of the old result. Operands with three axes get one head."""
        emit = partial(self.entry.emit, before=found.out, made_by=RaiseAttention.name)
        q, k, v = found.q, found.k, found.v
        one_head = value(q).dim() == 3
        if one_head:
            q, k, v = (emit(aten.unsqueeze.default, n, 1) for n in (q, k, v))
        mask = joined(emit, found.masks)
        if mask is not None and one_head and value(mask).dim() == 3:
            mask = emit(aten.unsqueeze.default, mask, 1)
        softcap = (found.softcap,) if found.softcap else ()
        new = self._attention(found, (q, k, v, mask, None, found.scale, found.causal, found.window, *softcap))
        if found.merged:
            return emit(aten.flatten.using_ints, new, 0, 1)
        return emit(aten.squeeze.dim, new, 1) if one_head else new

    def _attention(self, found: Attention, args: tuple[Any, ...]) -> fx.Node:
        """The call itself; its fact depends on the facts of its operands only."""
        key = tuple(str(value(x).shape) + str(value(x).dtype) if isinstance(x, fx.Node) else x for x in args)
        if key not in self.facts:
            self.facts[key] = self.entry.fact(ops.attention.target, args, {})
        with self.entry.graph.inserting_before(found.out):
            node = self.entry.graph.call_function(ops.attention.target, args)
        node.meta = inherited(found.out, RaiseAttention.name) | {"val": self.facts[key]}
        return node
