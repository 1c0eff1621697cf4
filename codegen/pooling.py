"""Pooling over windows of one, two or three spatial axes, behind any number of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sylvester.codegen.aten_indexing import inside
from sylvester.codegen.aten_reductions import stored
from sylvester.codegen.elementwise import call, choose, is_test, pointwise, value_of
from sylvester.codegen.index import Index, divide, index
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr, cast
from sylvester.codegen.shapes import per_axis

aten = torch.ops.aten
Make = Callable[[Indices, Indices], Expr]


@dataclass(frozen=True)
class Window:
    """One number per spatial axis; with `ceil` the last window may reach over the edge."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil: bool

    @staticmethod
    def of(rank: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Window:
        size = per_axis(kernel, rank)
        return Window(size, per_axis(stride, rank, size), per_axis(padding, rank), per_axis(dilation, rank), ceil)

    @property
    def taps(self) -> tuple[Index, ...]:
        return tuple(index(n) for n in self.kernel)

    def starts(self, o: Indices) -> list[Index]:
        places = o[len(o) - len(self.kernel) :]
        return [x * s - p for x, s, p in zip(places, self.stride, self.padding, strict=True)]

    def elements(self, x: Lazy, outside: float) -> Make:
        """The element under each tap, `outside` beyond the edges."""
        crosses = self.ceil or any(self.padding)

        def make(o: Indices, i: Indices) -> Expr:
            taps = [s + t * d for s, t, d in zip(self.starts(o), i, self.dilation, strict=True)]
            places = [*o[: len(o) - len(taps)], *taps]
            return inside(places, x, Constant(outside, "f32")) if crosses else x.load(places)

        return make


def _max_pool(rank: int, target: Any) -> None:
    @lowers(target)
    def lower(
        lowering: Lowering,
        fact: Fact,
        x: Lazy,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil: bool = False,
    ) -> Lazy:
        window = Window.of(rank, kernel, stride, padding, dilation, ceil)
        return lowering.reduce("max", fact.shape, window.taps, "f32", window.elements(stored(lowering, x), -math.inf))


def _avg_pool(rank: int, target: Any) -> None:
    @lowers(target)
    def lower(
        lowering: Lowering, fact: Fact, x: Lazy, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
        count_padding: bool = True, divisor: int | None = None,
    ) -> Lazy:  # fmt: skip
        window = Window.of(rank, kernel, stride, padding, 1, ceil)
        total = lowering.reduce("sum", fact.shape, window.taps, "f32", window.elements(stored(lowering, x), 0.0))
        if divisor or not (ceil or (any(window.padding) and not count_padding)):
            scale = Constant(1.0 / (divisor or math.prod(window.kernel)), "f32")
            return pointwise(fact, lambda t: call("mul", t, scale), total)
        return Lazy(fact.shape, "f32", lambda i: call("div", total.load(i), _counted(window, x, i, count_padding)))


def _counted(window: Window, x: Lazy, o: Indices, padding: bool) -> Expr:
    """Elements under the window; those of the padding count when `padding`."""
    extents = x.shape[len(x.shape) - len(window.kernel) :]
    number: Expr = Constant(1.0, "f32")
    for start, size, edge, extent in zip(window.starts(o), window.kernel, window.padding, extents, strict=True):
        first = value_of(start) if padding else call("max", value_of(start), Constant(0, "i64"))
        last = call("min", value_of(start + size), value_of(extent + edge if padding else extent))
        number = call("mul", number, cast(call("sub", last, first), "f32"))
    return number


for _rank in (1, 2, 3):
    _max_pool(_rank, getattr(aten, f"max_pool{_rank}d").default)
    _avg_pool(_rank, getattr(aten, f"avg_pool{_rank}d").default)


@dataclass(frozen=True)
class Span:
    """The source elements start, start + 1, ..., end - 1 of one result; `width` bounds their number."""

    start: Index
    end: Index
    width: Index
    exact: bool

    @staticmethod
    def of(place: Index, extent: Index, wanted: Index) -> Span:
        """From floor(place * extent / wanted) to ceil((place + 1) * extent / wanted)."""
        width, rest = divide(extent, wanted)
        if not rest.terms:
            return Span(place * width, (place + 1) * width, width, exact=True)
        end = ((place + 1) * extent + wanted - 1) // wanted
        return Span(place * extent // wanted, end, extent // wanted + 2, exact=False)


def _spans(fact: Fact, x: Lazy, o: Indices, rank: int) -> list[Span]:
    sizes = zip(o[len(o) - rank :], x.shape[len(o) - rank :], fact.shape[len(o) - rank :], strict=True)
    return [Span.of(*size) for size in sizes]


def _adaptive(fact: Fact, x: Lazy, rank: int, outside: float) -> tuple[tuple[Index, ...], Make]:
    """The taps of an adaptive window and the element under each, `outside` past its end."""

    def make(o: Indices, i: Indices) -> Expr:
        spans = _spans(fact, x, o, rank)
        places = [s.start + t for s, t in zip(spans, i, strict=True)]
        element = x.load([*o[: len(o) - rank], *places])
        for span, place in zip(spans, places, strict=True):
            if not span.exact:
                element = choose(is_test("lt", value_of(place), value_of(span.end)), element, Constant(outside, "f32"))
        return element

    return tuple(span.width for span in _spans(fact, x, [index(0)] * len(fact.shape), rank)), make


def _adaptive_avg_pool(rank: int, *targets: Any) -> None:
    @lowers(*targets)
    def lower(lowering: Lowering, fact: Fact, x: Lazy, output: Sequence[int]) -> Lazy:
        taps, make = _adaptive(fact, stored(lowering, x), rank, 0.0)
        total = lowering.reduce("sum", fact.shape, taps, "f32", make)

        def load(i: Indices) -> Expr:
            number: Expr = Constant(1.0, "f32")
            for span in _spans(fact, x, i, rank):
                number = call("mul", number, cast(value_of(span.end - span.start), "f32"))
            return call("div", total.load(i), number)

        return Lazy(fact.shape, "f32", load)


_adaptive_avg_pool(1, aten.adaptive_avg_pool1d.default)
_adaptive_avg_pool(2, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
