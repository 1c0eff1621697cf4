"""Grows a graph call by call: a record's operands become values of the graph or new sources, and running it decides."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.graphs import Graph, Ref, Size, Source, Step, mapped
from tests.fuzz.known import FINITE_ONLY
from tests.fuzz.records import Record, records
from tests.sampling import SIZES, Sample

TURNS = range(len(SIZES))
WIDTHS = ("n", "m", 1, 2, 3, 6, 8, 32, 33)
TRIES, APART = 20, 0.9
"""How often a record that takes nothing of the graph is left out."""
MOST_ELEMENTS, MOST_FLOAT, MOST_INT = 6000, 1e4, 2**30
INVALID = (RuntimeError, IndexError, ValueError, ZeroDivisionError, TypeError, OverflowError, NotImplementedError)
"""What PyTorch raises for calls that are not valid."""

Sizes = tuple[int, ...]
"""The size of an axis in each turn."""
KINDS = {"normal": torch.float32, "uniform": torch.float32, "edges": torch.float32, "integer": torch.int64}
KINDS |= {"bool": torch.bool}


class Rejected(Exception):
    """The call does not fit the graph."""


def constant(n: int) -> Sizes:
    return (n,) * len(SIZES)


def named(n: int | str) -> Sizes:
    return constant(n) if isinstance(n, int) else tuple(sizes[n] for sizes in SIZES)


NAMES = {named(name): name for name in SIZES[0]}


def sizes_of(turns: list[Any]) -> tuple[Sizes, ...]:
    return tuple(zip(*(t.shape for t in turns), strict=True)) if turns[0].ndim else ()


@dataclass
class Growth:
    """A graph and what each of its nodes is in every turn of sizes."""

    random: Random
    nodes: list[Source | Step] = field(default_factory=list)
    values: list[list[Any]] = field(default_factory=list)

    def source(self, sample: Sample) -> Ref:
        source = Source(sample, self.random.randrange(10**4))
        return self.append(source, [source.tensor(turn) for turn in TURNS])

    def append(self, node: Source | Step, turns: list[Any]) -> Ref:
        self.nodes.append(node)
        self.values.append(turns)
        return Ref(len(self.nodes) - 1)

    def tensors(self) -> list[int]:
        return [k for k, turns in enumerate(self.values) if isinstance(turns[0], Tensor)]

    def insert(self, record: Record) -> None:
        """Add the calls of a record, or leave the graph as it was and raise `Rejected`."""
        mark = len(self.nodes)
        try:
            places, sizes = _Operands(self, record).place()
            if all(ref.index >= mark for ref in places) and self.random.random() < APART:
                raise Rejected("apart")
            self._require_finite(record, places)
            for call in record.calls:
                places.append(self._call(call, places, sizes))
        except (*INVALID, Rejected) as error:
            del self.nodes[mark:], self.values[mark:]
            raise Rejected(str(error)) from error

    def _require_finite(self, record: Record, places: list[Ref]) -> None:
        given = [t for ref in places for t in self.values[ref.index] if t.is_floating_point()]
        if record.name.startswith(tuple(FINITE_ONLY)) and not all(bool(t.isfinite().all()) for t in given):
            raise Rejected("only finite values")

    def _call(self, call: Step, places: list[Ref], sizes: dict[int | str, Sizes]) -> Ref:
        failure: Exception = Rejected()
        for exact in (False, True):
            try:
                step = _settled(self, call, places, {} if exact else sizes, sizes)
                return self._run(step)
            except INVALID as error:
                failure = error
        raise failure

    def _run(self, step: Step) -> Ref:
        for turn in TURNS:
            require_room(step, [values[turn] for values in self.values])
        turns = [step.call([values[turn] for values in self.values]) for turn in TURNS]
        operands = [self.values[k] for k in step.operands]
        for turn, result in enumerate(turns):
            parts = list(result) if isinstance(result, (tuple, list)) else [result]
            for part in parts:
                require_sound(step, [o[turn] for o in operands], part)
        ref = self.append(step, turns)
        if isinstance(turns[0], Tensor):
            return ref
        parts = [self._run(Step(operator.getitem, (ref, k), {})) for k in range(len(turns[0]))]
        return parts[0]

    def whole(self, ref: Ref) -> Ref:
        """The node that a part was taken of."""
        node = self.nodes[ref.index]
        return node.args[0] if isinstance(node, Step) and node.target is operator.getitem else ref


def require_room(step: Step, results: list[Any]) -> None:
    """Reject positions past the end of a cache: the references read what there is, compiled code reports them."""
    schema = getattr(step.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else []
    given = dict(zip(names, step.args, strict=False)) | step.kwargs
    if not isinstance(given.get("past"), Ref):
        return
    cache, rows = (given[a if a in given else b].index for a, b in (("k", "cache"), ("q", "new")))
    if int(results[given["past"].index]) + results[rows].shape[2] > results[cache].shape[2]:
        raise Rejected("past the end of the cache")


def require_sound(step: Step, operands: list[Any], result: Any) -> None:
    """Reject what no two machines need agree on: huge numbers, and new infinities and NaNs that no constant made."""
    if not isinstance(result, Tensor) or result.numel() > MOST_ELEMENTS or result.ndim > 6:
        raise Rejected("too large")
    given = [o for o in operands if isinstance(o, Tensor) and o.is_floating_point()]
    finite = all(bool(o.isfinite().all()) for o in given)
    if not result.is_floating_point():
        if result.dtype != torch.bool and given and not finite and "to" in str(step.target):
            raise Rejected("an infinity as an integer")
        if result.dtype != torch.bool and result.numel() and int(result.long().abs().max()) > MOST_INT:
            raise Rejected("huge")
        return
    inside = result[result.isfinite()].abs()
    if inside.numel() and float(inside.max()) > MOST_FLOAT:
        raise Rejected("huge")
    infinite = any(isinstance(x, float) and math.isinf(x) for x in step.args)
    if finite and not infinite and inside.numel() < result.numel():
        raise Rejected("not finite")


def _settled(
    growth: Growth, call: Step, places: list[Ref], ties: dict[int | str, Sizes], sizes: dict[int | str, Sizes]
) -> Step:
    """The call over nodes of the graph; numbers that are sizes of the record follow its `ties`."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Ref):
            return growth.whole(places[x.index]) if call.target is operator.getitem else places[x.index]
        if isinstance(x, str) and x in SIZES[0]:
            return growth_size(growth, sizes.get(x, named(x)))
        if isinstance(x, int) and not isinstance(x, bool) and x > 1 and x in ties:
            return growth_size(growth, ties[x])
        return x

    args, kwargs = mapped((call.args, call.kwargs), leaf)
    return Step(call.target, args, kwargs)


def growth_size(growth: Growth, sizes: Sizes) -> int | Size:
    if sizes == constant(sizes[0]):
        return sizes[0]
    for k in growth.tensors():
        if sizes in (found := sizes_of(growth.values[k])):
            return Size(k, found.index(sizes))
    raise Rejected("no axis of that size")


class _Operands:
    """Finds a place for every sample of a record; the sizes they share are settled as they are met."""

    def __init__(self, growth: Growth, record: Record) -> None:
        self.growth, self.record, self.random = growth, record, growth.random
        self.sizes: dict[int | str, Sizes] = {}
        self.loose = growth.random.random() < 0.6
        self.first: tuple[Sizes, ...] | None = None

    def place(self) -> tuple[list[Ref], dict[int | str, Sizes]]:
        samples = self.record.samples
        order = sorted(range(len(samples)), key=lambda k: (samples[k].weight, self.random.random()))
        found = {k: self._one(samples[k]) for k in order}
        return [found[k] for k in range(len(samples))], self.sizes

    def _one(self, sample: Sample) -> Ref:
        reuse = 0.1 if sample.weight else 0.95 if self.first is None else 0.7
        if self.random.random() < reuse:
            for k in self._candidates(sample):
                if self._unify(sample, sizes_of(self.growth.values[k])):
                    return Ref(k)
        return self.growth.source(self._fresh(sample))

    def _candidates(self, sample: Sample) -> Iterator[int]:
        dtype = sample.dtype or KINDS.get(sample.kind)
        known = [k for k in self.growth.tensors() if self.growth.values[k][0].dtype == dtype]
        self.random.shuffle(known)
        latest = sorted(known[: 1 + len(known) // 2], reverse=True)
        return (k for k in latest if self._in_range(sample, k))

    def _in_range(self, sample: Sample, k: int) -> bool:
        if sample.kind != "integer" or self.record.pointwise:
            return True
        turns = [t for t in self.growth.values[k] if t.numel()]
        return all(int(t.min()) >= sample.low and int(t.max()) < sample.high for t in turns)

    def _unify(self, sample: Sample, shape: tuple[Sizes, ...]) -> bool:
        if self.record.pointwise:
            fits = self.first is None or _broadcasts(shape, self.first)
            self.first = self.first or shape
            return fits
        if len(shape) != len(sample.shape):
            return False
        bound: dict[int | str, Sizes] = {}
        for n, sizes in zip(sample.shape, shape, strict=True):
            known = self.sizes.get(n, bound.get(n))
            if known is None and isinstance(n, int) and (n == 1 or not self.loose):
                known = constant(n)
            if known not in (None, sizes):
                return False
            bound[n] = sizes
        self.sizes |= {n: s for n, s in bound.items() if n != 1}
        self.first = shape
        return True

    def _fresh(self, sample: Sample) -> Sample:
        if self.record.pointwise and self.first is not None:
            tail = self.first[self.random.randint(0, len(self.first)) :]
            shape = [constant(1) if self.random.random() < 0.2 else s for s in tail]
            return replace(sample, shape=tuple(map(source_size, shape)))
        for n in sample.shape:
            self.sizes.setdefault(n, self._drawn(n))
        made = replace(sample, shape=tuple(source_size(self.sizes[n]) for n in sample.shape))
        self.first = self.first or tuple(map(named, made.shape))
        if made.weight and {"n", "m"} & set(made.shape):
            raise Rejected("a weight has one size")
        weight = made.weight or (self.random.random() < 0.3 and "n" not in made.shape and "m" not in made.shape)
        return replace(made, weight=weight)

    def _drawn(self, n: int | str) -> Sizes:
        free = isinstance(n, str) or (self.loose and n != 1 and self.random.random() < 0.3)
        return named(self.random.choice(WIDTHS) if free and self.random.random() < 0.3 else n)


def source_size(sizes: Sizes) -> int | str:
    if sizes == constant(sizes[0]):
        return sizes[0]
    if sizes not in NAMES:
        raise Rejected("no source has that size")
    return NAMES[sizes]


def _broadcasts(shape: tuple[Sizes, ...], other: tuple[Sizes, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return all(a == b or constant(1) in (a, b) for a, b in pairs)


def _start(growth: Growth) -> None:
    random = growth.random
    for _ in range(random.randint(1, 2)):
        shape = ("n", *(random.choice(WIDTHS) for _ in range(random.randint(1, 3))))
        kind = random.choice(["normal"] * 12 + ["integer", "bool", "edges"])
        growth.source(Sample(shape, kind, -9, 10))


def grow(random: Random, most: int = 20) -> Graph:
    """A valid graph of up to `most` records; the same one for the same numbers."""
    growth = Growth(random)
    _start(growth)
    known, wanted = records(), random.randint(3, most)
    for _ in range(TRIES * most):
        if len([n for n in growth.nodes if isinstance(n, Step)]) >= wanted:
            break
        if random.random() < 0.08 and (steps := [n for n in growth.nodes if isinstance(n, Step)]):
            growth._run(random.choice(steps))
            continue
        try:
            growth.insert(random.choice(known[random.choice(list(known))]))
        except Rejected:
            continue
    return _finished(growth)


def _finished(growth: Growth) -> Graph:
    """Every value that nothing uses is an output, and a few others; an empty graph when no source is left."""
    used = {k for node in growth.nodes if isinstance(node, Step) for k in node.operands}
    calls = [k for k in growth.tensors() if isinstance(growth.nodes[k], Step)]
    kept = [k for k in calls if k not in used or growth.random.random() < 0.1]
    kept = [k for k in kept if growth.values[k][0].dtype in (torch.float32, torch.int64, torch.int32, torch.bool)]
    made = Graph(tuple(growth.nodes), tuple(kept)).pruned()
    return made if made.sources else Graph((), ())
