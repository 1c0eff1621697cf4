"""How tensors that are kept in 8 bits come back: as memory of the same shape and steps, from rows of values."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_grouped import GROUP, restored, turned_back
from sylvester.compiler.halo_quantise import Rounded


@dataclass(frozen=True)
class Layout:
    """A tensor as memory: `shape` with `steps` between values, which fill it but where a step is 0."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    dtype: torch.dtype

    def fill(self, x: Tensor) -> Tensor:
        """The tensor whose memory is x [rows, width]."""
        return x.as_strided(self.shape, self.steps)


def laid_out(x: Tensor) -> tuple[Tensor, Layout]:
    """x [rows, width] in the order of its memory, each value that is repeated once, and how it was laid out."""
    between: tuple[int, ...] = x.stride()
    repeated = [n > 1 and step == 0 for n, step in zip(x.shape, between, strict=True)]
    own = x[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
    order = sorted(range(x.ndim), key=lambda axis: (-between[axis], axis))
    steps, step = [0] * x.ndim, 1
    for axis in reversed(order):
        steps[axis] = 0 if repeated[axis] else step
        step *= own.shape[axis]
    return _rows(own.permute(order)), Layout(tuple(x.shape), tuple(steps), x.dtype)


def _rows(x: Tensor) -> Tensor:
    """[rows, width]: a width is a last axis, or several where it is narrow or where rows lie apart from each other."""
    run = 1
    for size, step in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if size > 1 and step != run:
            break
        run *= size
    if GROUP <= run < x.numel():
        with contextlib.suppress(RuntimeError):
            return x.view(-1, run)
    width = 1
    for size in reversed(x.shape):
        width *= size
        if width >= GROUP:
            break
    return x.reshape(-1, width)


class Form(ABC):
    """How a tensor comes from the parts that are kept of it."""

    @abstractmethod
    def restore(self, parts: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Groups(Form):
    """int8 and the scales of groups."""

    layout: Layout

    def restore(self, parts: Sequence[Tensor]) -> Tensor:
        return self.layout.fill(restored(Rounded(*parts), self.layout.dtype))


@dataclass(frozen=True)
class OfLinear(Form):
    """What a linear layer keeps of the same values."""

    layout: Layout
    features: bool

    def restore(self, parts: Sequence[Tensor]) -> Tensor:
        return self.layout.fill(turned_back(Rounded(*parts), self.layout.dtype, self.features))


@dataclass(frozen=True)
class Mask(Form):
    """Where values are not 0: all that the gradient of ReLU reads, and with `share` all that dropout draws."""

    layout: Layout
    share: float = 1.0

    def restore(self, parts: Sequence[Tensor]) -> Tensor:
        return self.layout.fill(parts[0].to(self.layout.dtype).div_(self.share))


@dataclass(frozen=True)
class Same(Form):
    """The tensor itself, which nothing may write to before it is read."""

    version: int | None
    """Of the tensor when it was saved; None where hooks around the module may give another tensor."""

    def restore(self, parts: Sequence[Tensor]) -> Tensor:
        found = parts[0]
        if self.version not in (None, found._version):
            raise CompileError(
                f"a tensor {list(found.shape)} that the backward pass reads was written to after the forward pass",
                hint="step the optimizer after all backward passes, and write to no activation in place",
            )
        return found
