"""Sample calls of ops as data: shapes with symbolic sizes, kinds of random values, and the expected result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sylvester.compiler.cache_ops import quantize_records
from sylvester.compiler.ops import Ints, Records, Stored

Size = int | str
SIZES = ({"n": 5, "m": 7}, {"n": 3, "m": 11}, {"n": 1, "m": 34})
"""Values of the symbolic sizes: those of the trace, then others the same code must serve."""
EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 100.0, -100.0, math.inf, -math.inf, math.nan)


@dataclass(frozen=True)
class Sample:
    """A random tensor.

    `kind`: normal, short (held by bfloat16), uniform or integer in [low, high), bool, edges, records of `low` bits.
    """

    shape: tuple[Size, ...]
    kind: str = "normal"
    low: float = 0
    high: float = 0
    weight: bool = False
    dtype: torch.dtype | None = None
    """What the values are converted to, where it is not the usual type of the kind."""

    def sizes(self, values: dict[str, int]) -> tuple[int, ...]:
        return tuple(values[n] if isinstance(n, str) else n for n in self.shape)

    def tensor(self, values: dict[str, int], random: torch.Generator) -> Tensor:
        made = self._values(values, random)
        return made if self.dtype is None else made.to(self.dtype)

    def _values(self, values: dict[str, int], random: torch.Generator) -> Tensor:
        shape = (*EDGES, *EDGES) if self.kind == "edges" else self.sizes(values)
        if self.kind == "edges":
            return torch.tensor(shape)[torch.arange(math.prod(self.sizes(values))) % len(EDGES)].view(
                self.sizes(values)
            )
        if self.kind == "bool":
            return torch.rand(shape, generator=random) < 0.5
        if self.kind == "integer":
            return torch.randint(int(self.low), int(self.high), shape, generator=random)
        if self.kind == "uniform":
            return torch.rand(shape, generator=random) * (self.high - self.low) + self.low
        made = torch.randn(shape, generator=random)
        if self.kind == "records":
            return quantize_records(made, int(self.low))
        return made.bfloat16().float() if self.kind == "short" else made


def f(*shape: Size) -> Sample:
    return Sample(shape)


def u(*shape: Size, low: float = 0.1, high: float = 3.0) -> Sample:
    return Sample(shape, "uniform", low, high)


def i(*shape: Size, low: int = -9, high: int = 10) -> Sample:
    return Sample(shape, "integer", low, high)


def b(*shape: Size) -> Sample:
    return Sample(shape, "bool")


def w(*shape: Size) -> Sample:
    """A stored weight instead of an input."""
    return Sample(shape, weight=True)


def edges(*shape: Size) -> Sample:
    return Sample(shape, "edges")


@dataclass(frozen=True)
class Case:
    """One call. Strings "n" and "m" among the arguments stand for symbolic sizes."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Sample)]

    @property
    def symbolic(self) -> bool:
        return any(isinstance(n, str) for s in self.samples for n in s.shape)

    def tensors(self, values: dict[str, int], seed: int = 0) -> list[Tensor]:
        random = torch.Generator().manual_seed(seed)
        return [s.tensor(values, random) for s in self.samples]

    def call(self, tensors: list[Tensor], values: dict[str, int], *, wide: bool) -> list[Tensor]:
        """The op in PyTorch; `wide` computes floats in float64."""
        rest = iter(tensors)

        def concrete(leaf: Any) -> Any:
            if isinstance(leaf, Sample):
                tensor = next(rest)
                return tensor.double() if wide and tensor.is_floating_point() else tensor
            if isinstance(leaf, str) and leaf in values:
                return values[leaf]
            return torch.float64 if wide and leaf is torch.float32 else leaf

        args, kwargs = pytree.tree_map(concrete, (self.args, self.kwargs))
        result = self.target(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)


def c(targets: Any, *args: Any, **kwargs: Any) -> Iterator[Case]:
    for target in targets if isinstance(targets, tuple) else (targets,):
        yield Case(target, args, kwargs)


def sample(argument: object) -> object:
    """The argument of an example as a sample; anything else stays."""
    if isinstance(argument, Ints):
        return Sample(argument.shape, "integer", 0, argument.high)
    if isinstance(argument, Records):
        return Sample(argument.shape, "records", argument.bits)
    if isinstance(argument, Stored) and argument.dtype.is_floating_point:
        return Sample(argument.shape, "short", weight=True, dtype=argument.dtype)
    if isinstance(argument, Stored):
        limits = torch.iinfo(argument.dtype)
        return Sample(argument.shape, "integer", limits.min, limits.max + 1, True, argument.dtype)
    shape = isinstance(argument, tuple) and all(isinstance(n, int) for n in argument)
    return Sample(argument) if shape else argument
