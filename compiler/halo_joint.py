"""HALO on a joint graph: every product of the chosen layers, forward and backward, rotated and in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from sylvester.compiler import joint_rotations as rotations
from sylvester.compiler.halo_ops import Level, Turns, level_of
from sylvester.compiler.joint_fusing import fuse
from sylvester.compiler.joint_graph import Joint
from sylvester.compiler.joint_products import Product, find, merge_repeats
from sylvester.compiler.joint_rounding import keep_rounded, round_operands


@dataclass(frozen=True)
class Rewritten:
    """What was done: the layers by their weight, the rotations that were placed, those that are left of them, and of
    these the ones that no kernel does beside its work."""

    weights: tuple[str, ...]
    placed: int
    left: int
    alone: int

    def __str__(self) -> str:
        left = f"{self.left} of {self.placed} rotations are left"
        return f"{len(self.weights)} layers, {left}, {self.alone} of them alone"


def rewrite(joint: Joint, level: int, format: str, chosen: Callable[[str], bool]) -> Rewritten:
    """Products of weights that are `chosen` by name."""
    turns = level_of(level)
    products = [p for p in find(joint) if chosen(p.weight)]
    for product in products:
        _place(joint.graph, product, turns)
    placed = rotations.count(joint.graph)
    merge_repeats(joint.graph)
    rotations.cancel(joint.graph)
    round_operands(joint.graph, products, format)
    keep_rounded(joint)
    left = rotations.count(joint.graph)
    fuse(joint.graph)
    weights = tuple(dict.fromkeys(p.weight for p in products))
    return Rewritten(weights, placed, left, rotations.count(joint.graph))


def _place(graph: fx.Graph, product: Product, level: Level) -> None:
    turns: Turns = getattr(level, product.kind)
    if turns.right or (turns.middle and product.kind == "forward"):
        rotations.features(graph, product)
    if turns.left:
        rotations.error_tokens(graph, product)
    if turns.middle and product.kind == "gradient":
        rotations.gradient_tokens(graph, product)
