"""d(i) = how far block i + 1 moves the stream: KL of what both blocks' mean outputs predict, else 1 - cosine.

Neighbours that drift little are grouped (MASA, 2025: "Share Your Attention").
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.errors import CompileError
from sylvester.compiler.gram import Watch
from sylvester.compiler.next_token import language_model
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.quality import kl_rows
from sylvester.compiler.region import Region
from sylvester.compiler.structure import Stack

SAMPLES = 8
"""Calibration samples that are looked at."""
TINY = 1e-30


def drift(program: Program, stack: Stack) -> list[float]:
    """One number per pair of neighbouring blocks, measured on calibration data."""
    tail = _tail(program, stack)
    watch = _Means(program, [block.end for block in stack.blocks], tail.inputs if tail else ())
    samples = program.calibration.fit[:SAMPLES] if program.calibration else ()
    for sample in samples:
        watch.run_on(sample)
    if tail is None:
        return [1 - found / max(watch.count, 1) for found in watch.cosines]
    last = stack.blocks[-1].end
    scores = [watch.predict(tail, last, total / watch.count) for total in watch.totals]
    return [float(kl_rows(a, b)) for a, b in pairwise(scores)]


def _tail(program: Program, stack: Stack) -> Region | None:
    """What turns the stream after the last block into scores of the next token; None where nothing does."""
    model, last = language_model(program), stack.blocks[-1].end
    if model is None:
        return None
    try:
        return Region.between(last, program.main.result(model.scores))
    except CompileError:
        return None


class _Means(Watch):
    """Sums the rows of values, and the cosines of the rows of neighbours; remembers what the last sample gave."""

    def __init__(self, program: Program, values: Sequence[fx.Node], others: Sequence[fx.Node]) -> None:
        super().__init__(program, ())
        self.ends = [node.name for node in values]
        self.wanted = {*self.ends, *(node.name for node in others)}
        self.known: dict[str, Any] = {}
        self.totals: list[Any] = [0.0] * len(values)
        self.cosines = [0.0] * (len(values) - 1)
        self.count = 0

    def run_on(self, sample: Any) -> Any:
        result = super().run_on(sample)
        ends = [self.known[name].flatten(0, -2).double() for name in self.ends]
        self.totals = [total + end.sum(0) for total, end in zip(self.totals, ends, strict=True)]
        for i, (a, b) in enumerate(pairwise(ends)):
            self.cosines[i] += float(torch.cosine_similarity(a, b, dim=-1).sum())
        self.count += len(ends[0])
        return result

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.name in self.wanted:
            self.known[n.name] = found
        return found

    def predict(self, tail: Region, last: fx.Node, mean: Tensor) -> Tensor:
        """The scores [1, vocabulary] that the tail makes of one vector in place of the stream."""
        stream = self.known[last.name]
        values: dict[fx.Node, Any] = {last: mean.to(stream.dtype).expand_as(stream)}

        def read(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            return self.program.weights[binding(node).key] if is_weight(node) else self.known[node.name]

        with torch.no_grad():
            for node in tail.nodes:
                args, kwargs = map_arg((node.args, dict(node.kwargs)), read)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[tail.nodes[-1]].flatten(0, -2)[:1]  # type: ignore[no-any-return]


def consecutive_groups(drifts: Sequence[float], size: int) -> list[range]:
    """len(drifts) + 1 blocks in ceil(blocks / size) runs with the least drift inside, of equals the most even ones.

    A run has 3 size / 2 blocks at most, and not one alone where that can be helped.
    """
    blocks, most = len(drifts) + 1, size + size // 2
    count = -(-blocks // size)
    least = 2 if 2 * count <= blocks and most > 1 else 1
    before = [0.0, *accumulate(drifts, initial=0.0)]

    @cache
    def best(end: int, runs: int) -> tuple[float, int, tuple[int, ...]]:
        """The least drift inside `runs` runs of the first `end` blocks, their squared lengths, and where they end."""
        if runs == 0 or end <= 0:
            return (0.0, 0, ()) if runs == 0 and end == 0 else (math.inf, 0, ())
        found = []
        for start in range(max(0, end - most), end - least + 1):
            cost, squares, ends = best(start, runs - 1)
            found.append((cost + before[end] - before[start + 1], squares + (end - start) ** 2, (*ends, end)))
        return min(found, default=(math.inf, 0, ()))

    return [range(a, b) for a, b in pairwise((0, *best(blocks, count)[2]))]


def check_groups(groups: Collection[Collection[int]], lengths: Sequence[int]) -> None:
    """Raise `CompileError` for blocks that the stacks, of so many blocks each, lack, and for groups across stacks."""
    stack_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    for group in groups:
        wrong = [n for n in group if n >= len(stack_of)]
        if wrong:
            raise CompileError(f"groups name block {wrong[0]}, the program has blocks 0 .. {len(stack_of) - 1}")
        if len({stack_of[n] for n in group}) > 1:
            raise CompileError(f"the group {tuple(group)} is of two stacks of unequal blocks", hint="split the group")
