"""decode -> tree: decode over a tree of tokens, whose depths say where each stands and what it sees.

arange(length) + past -> depths + past, and attention(q, k, v) -> attention(q, k, v, depths=depths).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.changes import Refusal
from sylvester.compiler.program import Entry, Program, binding, fake_empty, value
from sylvester.compiler.stages import DECODE, DEPTHS, TREE, stages_of
from sylvester.compiler.steady import ATTENTION

aten = torch.ops.aten


def add_tree(program: Program) -> Refusal | None:
    """The entry `tree`, unless something in `decode` is known for chains of tokens only."""
    if len(stages_of(program.info)) > 1:
        return Refusal("what decodes depends on the position")
    entry = program.entries[DECODE].clone()
    places = entry.calls(aten.arange.default, aten.arange.start, aten.arange.start_step)
    attention = entry.calls(*ATTENTION)
    refusal = next(filter(None, [*map(_no_place, places), *map(_own_mask, attention)]), None)
    if refusal:
        return refusal
    depths = _depths(entry)
    for node in places:
        entry.replace(node, depths)
    for node in attention:
        options: dict[str, Any] = {**node.kwargs, DEPTHS: depths}
        target = cast(Callable[..., Any], node.target)
        entry.replace(node, entry.emit(target, *node.args, before=node, made_by="draft", **options))
    entry.sweep()
    program.entries[TREE] = entry
    return None


def _no_place(node: fx.Node) -> Refusal | None:
    """A count that is more than how far each token is from `past`."""
    added = all(user.target == aten.add.Tensor and any(_is_past(x) for x in user.args) for user in node.users)
    if node.target == aten.arange.default and value(node).dtype == torch.int64 and added:
        return None
    return Refusal("tokens are counted otherwise than from the position", node)


def _is_past(x: object) -> bool:
    return isinstance(x, fx.Node) and x.op == "placeholder" and binding(x).key == "past"


def _own_mask(node: fx.Node) -> Refusal | None:
    """A mask with a row for each query is in the order of the queries, not of their positions."""
    mask = node.args[3]
    if isinstance(mask, fx.Node) and value(mask).shape[-2] != 1:
        return Refusal("an attention has a mask of its own for each token", node)
    return None


def _depths(entry: Entry) -> fx.Node:
    """The input, as long as there are tokens."""
    tokens: Tensor = value(next(n for n in entry.placeholders("input") if value(n).ndim == 2))
    depths = entry.bind("input", DEPTHS, fake_empty(entry.fake_mode, (tokens.shape[1],), torch.int64))
    example = next(x for x in entry.examples.values() if x.ndim == 2)
    entry.examples[DEPTHS] = torch.arange(example.shape[1])
    return depths
