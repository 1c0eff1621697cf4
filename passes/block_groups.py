"""Groups of neighbouring blocks: which may share, which are most alike, and the one set of matrices they read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import fx

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.dataflow import Segment
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layer_lines import Site
from sylvester.compiler.layers import START, Layer
from sylvester.compiler.parts import is_weighted
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.region import rebind
from sylvester.passes.depth import derive_start

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.einsum.default)
Groups = tuple[tuple[int, ...], ...]


def require_groups(groups: object) -> None:
    """A number of sets, or tuples of neighbours; raises TypeError or ValueError."""
    if isinstance(groups, bool) or not isinstance(groups, (int, tuple)):
        raise TypeError(f"groups is a {type(groups).__name__}, expected a number or a tuple of tuples of block numbers")
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError(f"groups is {groups}, expected 0 or more")
        return
    for group in groups:
        if not isinstance(group, tuple) or len(group) < 2 or not all(isinstance(n, int) and n >= 0 for n in group):
            raise ValueError(f"groups holds {group!r}, expected a tuple of at least 2 block numbers")
        if any(b != a + 1 for a, b in pairwise(group)):
            raise ValueError(f"groups holds {group!r}, expected neighbouring blocks in order")
    numbers = [n for group in groups for n in group]
    if twice := sorted({n for n in numbers if numbers.count(n) > 1}):
        raise ValueError(f"block {twice[0]} is in two groups")


def require_neighbours(layers: Sequence[Layer]) -> None:
    """`CompileError` where a group goes beyond a stack."""
    for before, after in pairwise(layers):
        if after.place != before.place + 1:
            raise CompileError(f"blocks {before.index} and {after.index} are no neighbours: another stack begins")


def even_groups(blocks: int, wanted: int, joins: Mapping[int, float]) -> Groups:
    """Blocks in `wanted` sets: neighbours joined, the most alike first, no set larger than needed.

    `joins[n]` says how alike blocks n - 1 and n are, where they may be together. Blocks by themselves are left out.
    """
    sets = [[n] for n in range(blocks)]
    free = len(joins) + 1
    most = max(2, math.ceil(free / max(1, wanted - (blocks - free))))
    while len(sets) > wanted:
        pairs = [(a, b) for a, b in pairwise(sets) if b[0] in joins]
        if not pairs:
            raise CompileError(
                f"groups is {wanted}, but only equal neighbours can share: {len(sets)} sets are left",
                hint=f"give groups={len(sets)} or more",
            )
        small = [(a, b) for a, b in pairs if len(a) + len(b) <= most]
        most += not small
        if small:
            a, b = max(small, key=lambda pair: joins[pair[1][0]])
            a += b
            sets.remove(b)
    return tuple(tuple(group) for group in sets if len(group) > 1)


def share(program: Program, layers: Sequence[Layer], groups: Groups, changes: Changes) -> None:
    """The blocks of each group read the matrices of its first one; a block that cannot is refused."""
    for group in groups:
        first = layers[group[0]]
        for number in group[1:]:
            layer = layers[number]
            refusal = unlike(first, layer)
            if refusal:
                changes.refuse("share", refusal, layer.path)
                continue
            _bind(program, first, layer)
            changes.apply("share", layer.path)
            changes.became(layer.path, "block", f"shares {first.path}")
    program.sweep()
    if START in program.entries and changes.counts().get("share"):
        derive_start(program, changes)


def unlike(first: Layer, layer: Layer) -> Refusal | None:
    """Why a block cannot take the matrices of another."""
    mine, theirs = ([s.digest for s in _segments(site)] for site in (layer.main, first.main))
    if mine != theirs:
        return Refusal(f"it does not compute what block {first.index} does, in equal shapes", layer.main.end)
    if layer.place == 0:
        return Refusal("it is the first of its stack", layer.main.end)
    if first.sites.keys() != layer.sites.keys():
        return Refusal(f"block {first.index} is run by {list(first.sites)}, it by {list(layer.sites)}", layer.main.end)
    return None


def _segments(site: Site) -> list[Segment]:
    return list({segment.end: segment for _, segment in site.parts}.values())


def _bind(program: Program, first: Layer, layer: Layer) -> None:
    """Every entry reads the matrices of the first block where it read those of the layer."""
    keys = _matrices(first, layer)
    for name, site in layer.sites.items():
        nodes = [node for segment in _segments(site) for node in segment.nodes]
        read = {u for node in nodes for u in node.all_input_nodes if is_weight(u) and binding(u).key in keys}
        rebind(program.entries[name], program.weights, {u: keys[binding(u).key] for u in read}, nodes)


def _matrices(first: Layer, layer: Layer) -> dict[str, str]:
    """Keys of the layer's matrices and of the biases of these -> keys of the first block."""
    found: dict[str, str] = {}
    for mine, theirs in zip(_segments(layer.main), _segments(first.main), strict=True):
        pairs = zip(mine.parameters, theirs.parameters, strict=True)
        found |= {binding(a).key: binding(b).key for a, b in pairs if _of_matrix(a, set(mine.nodes))}
    return found


def _of_matrix(weight: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether it is multiplied as a matrix or filter, or added in the same call, also through views of itself."""
    users = [user for user in weight.users if user in inside]
    views = [user for user in users if all(is_weight(u) for u in user.all_input_nodes)]
    direct = any(is_weighted(user) or user.target in PRODUCTS for user in users)
    return direct or any(_of_matrix(view, inside) for view in views)
