"""Biases of attention scores that depend on the position of the key alone, up to a constant per query: ALiBi."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from sylvester.compiler import ops
from sylvester.compiler.changes import Refusal
from sylvester.compiler.masks import evaluate, size_only
from sylvester.compiler.program import Program, value

NAME = "key_bias"
"""Name of the weights that hold the biases of the keys of caches."""
LENGTHS = (3, 5, 8, 64)
MOST = 1 << 26
"""Elements of a bias over queries and keys that are evaluated at once."""


def key_bias(program: Program, mask: fx.Node, length: int) -> Tensor | Refusal:
    """What a causal attention adds for keys 0 .. length - 1 beyond what it adds for key 0: [1, heads or 1, 1, length].

    The softmax over the keys of a query does not see a constant: slopes * (key - query) is slopes * key. The bias of a
    key may depend neither on the number of keys nor on the content of an input.
    """
    fact = value(mask)
    if not fact.is_floating_point() or fact.dim() < 2:
        return Refusal(f"it is {fact.dtype} of {fact.dim()} axes, expected floats over queries and keys", mask)
    nodes = size_only(mask)
    if isinstance(nodes, Refusal):
        return nodes
    heads = fact.shape[-3] if fact.dim() > 2 else 1
    if not isinstance(heads, int):
        return Refusal("its number of heads is symbolic", mask)
    most = length if isinstance(fact.shape[-2], int) else min(length, math.isqrt(MOST // heads))
    try:
        grids = [evaluate(program, mask, nodes, n, n) for n in dict.fromkeys((*LENGTHS, most)) if n <= most]
    except (RuntimeError, IndexError) as error:
        return Refusal(f"it cannot be evaluated up to length {most}: {error}", mask)
    if grids[-1].shape[-1] != most:
        return Refusal(f"it holds {grids[-1].shape[-1]} keys", mask)
    *shorter, whole = (_row(grid) for grid in grids)
    if whole is None or any(row is None or not _close(row, whole[..., : row.shape[-1]]) for row in shorter):
        return Refusal("it depends on more than the position of the key", mask)
    return whole if most == length else _continued(mask, whole, length)


def most_keys(mask: fx.Node, bound: int) -> int:
    """The keys of the table that a bias is cut from; `bound` where it serves that many."""
    size = value(mask).shape[-1]
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, bound)))


def _continued(mask: fx.Node, row: Tensor, length: int) -> Tensor | Refusal:
    """A bias that grows evenly, for more keys."""
    slope = row[..., -1:].double() / (row.shape[-1] - 1)
    line = (slope * torch.arange(length)).to(row.dtype)
    if not _close(line[..., : row.shape[-1]], row):
        return Refusal(
            f"it does not grow evenly over {row.shape[-1]} keys, and {length} are too many to evaluate", mask
        )
    return line


def _row(grid: Tensor) -> Tensor | None:
    """The bias of every key beyond that of key 0, where it is the same for every sequence and query that sees it."""
    if not grid.isfinite().all():
        return None
    wide = grid.reshape(-1, *[1] * (3 - grid.dim()), *grid.shape[-3:])
    bias = wide - wide[..., :1]
    last = bias[:1, :, -1:]
    queries, keys = bias.shape[-2:]
    seen = ops.visible(queries, keys, keys - queries, True, 0, bias.device)
    return last if _close(bias.masked_fill(~seen, 0), last.expand_as(bias).masked_fill(~seen, 0)) else None


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal but for the rounding of the largest."""
    allowed = 4 * torch.finfo(y.dtype).eps * float(y.abs().max())
    return bool((x - y).abs().max() <= allowed)


def stored(program: Program) -> list[str]:
    """The weights that hold biases of keys."""
    return [key for key in program.weights if key == NAME or key.startswith(f"{NAME}.")]


def only_for(masks: Iterable[fx.Node], users: set[fx.Node]) -> set[fx.Node]:
    """The calls whose values only go into `masks` of the attentions `users`, and into other such calls."""
    found: set[fx.Node] = set()
    stack = list(masks)
    while stack:
        node = stack.pop()
        if node.op != "call_function" or node in found:
            continue
        if all(user in found or (user in users and _is_mask_only(node, user)) for user in node.users):
            found.add(node)
            stack += node.all_input_nodes
    return found


def _is_mask_only(node: fx.Node, attention: fx.Node) -> bool:
    return attention.args[3] is node and list(attention.args).count(node) == 1
