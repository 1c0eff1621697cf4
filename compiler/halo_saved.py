"""What autograd saves of activations, kept in 8 bits until the backward pass reads it (saved tensor hooks of PyTorch).

Hooks surround single ops of a graph. What has no gradient, such as masks, statistics and tables, what is small, and
parameters are kept as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sylvester.compiler.halo_grouped import grouped
from sylvester.compiler.halo_kernels import PLAIN
from sylvester.compiler.halo_layout import Form, Groups, Layout, Mask, OfLinear, Same, laid_out
from sylvester.compiler.halo_quantise import Rounded

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LEAST = 1024
"""Tensors of fewer values are kept as they are."""
autograd: Any = torch._C._autograd


class Hooks(NamedTuple):
    """Those around the module, as checkpoints have them: they get what is kept in 8 bits."""

    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]


@dataclass
class Saved:
    """What autograd holds for a tensor: the parts, or what the hooks around the module made of them."""

    form: Form | None
    parts: list[Any]
    outer: Hooks | None

    def fill(self, form: Form, parts: Sequence[Tensor]) -> None:
        self.form, self.parts = form, [part if self.outer is None else self.outer.pack(part) for part in parts]

    def restore(self) -> Tensor:
        given = self.parts if self.outer is None else [self.outer.unpack(part) for part in self.parts]
        return cast(Form, self.form).restore(given)


class Packed(NamedTuple):
    """Parts of one tensor, whatever number of ops saves it; `source` tells its memory from a later one."""

    parts: Sequence[Tensor]
    source: StorageWeakRef


class Operand(NamedTuple):
    """What an op reads, without the memory, which hooks would hold."""

    storage: int
    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> Operand:
        return Operand(x.untyped_storage()._cdata, x.shape, x.dtype)

    def shares(self, x: Tensor) -> bool:
        return bool(x.untyped_storage()._cdata == self.storage)

    def gives(self, x: Tensor) -> bool:
        """Whether x is the operand, a view of it, or what autocast made of it."""
        return self.shares(x) or (x.shape in (self.shape, self.shape[::-1]) and x.dtype != self.dtype)


@dataclass(frozen=True)
class Kind:
    """Which tensors that an op saves are rounded: activations of at least `least` values that are not `weights`."""

    weights: tuple[Operand, ...] = ()
    least: int = LEAST

    def takes(self, x: Tensor) -> bool:
        whole = type(x) in PLAIN and x.dtype in FLOATS and x.numel() >= self.least and x.shape[-1] > 1
        return whole and self.is_activation(x)

    def is_activation(self, x: Tensor) -> bool:
        of_leaf = x.grad_fn is None or (x._base is not None and x._base.is_leaf and x._base.requires_grad)
        return x.requires_grad and not of_leaf and not any(weight.gives(x) for weight in self.weights)

    def form(self, layout: Layout) -> Form:
        return Groups(layout)

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        return grouped(rows)

    def waits(self, x: Tensor) -> bool:
        """Whether a linear layer is going to keep the same values."""
        return False


@dataclass(frozen=True)
class Result(Kind):
    """What an attention saves, the result [..., features] of which a linear layer keeps, not its `operands`."""

    operands: tuple[Operand, ...] = ()

    def waits(self, x: Tensor) -> bool:
        return x.shape == self.operands[0].shape and not any(operand.shares(x) for operand in self.operands)


@dataclass(frozen=True)
class Sign(Kind):
    """The result of ReLU."""

    def form(self, layout: Layout) -> Form:
        return Mask(layout)

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        return (rows != 0,)


@dataclass(frozen=True)
class Noise(Kind):
    """What dropout multiplies with, 0 or 1 / `share`."""

    share: float = 1.0

    def is_activation(self, x: Tensor) -> bool:
        return not x.requires_grad

    def form(self, layout: Layout) -> Form:
        return Mask(layout, self.share)

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        return (rows != 0,)


@dataclass
class Keeper:
    """Packs for one forward pass, at whose end autograd alone holds what is packed."""

    packed: dict[Any, Packed] = field(default_factory=dict)
    waiting: list[tuple[Tensor, Saved]] = field(default_factory=list)
    """Results that are rounded by the linear layer that reads them."""
    inputs: dict[int, Rounded] = field(default_factory=dict)
    """What several linear layers read, by number, as the first of them has rounded it."""

    __hash__ = object.__hash__

    @contextlib.contextmanager
    def around(self, kind: Kind) -> Iterator[None]:
        """Hooks for what autograd saves inside; none where nothing is saved, or while a graph is traced."""
        if not _is_saving():
            yield
            return
        keeper, outer = ref(self), _outer_hooks()

        def pack(x: Tensor) -> Saved:
            return cast(Keeper, keeper())._saved(x, kind, outer)

        with saved_tensors_hooks(pack, Saved.restore):
            yield

    @contextlib.contextmanager
    def seeing(self) -> Iterator[list[Tensor]]:
        """What autograd saves inside, in order, until the end; it is kept as it is."""
        found: list[Tensor] = []
        if not _is_saving():
            yield found
            return
        outer = _outer_hooks()

        def pack(x: Tensor) -> Saved:
            found.append(x.detach())
            return _same(x, outer)

        with saved_tensors_hooks(pack, Saved.restore):
            yield found
        found.clear()

    def _saved(self, x: Tensor, kind: Kind, outer: Hooks | None) -> Saved:
        if not kind.takes(x):
            return _same(x, outer)
        made = Saved(None, [], outer)
        if kind.waits(x):
            self.waiting.append((x.detach(), made))
        else:
            self._pack(x.detach(), kind, made)
        return made

    def _pack(self, x: Tensor, kind: Kind, saved: Saved) -> None:
        """Round x, or take the parts of what has the same memory."""
        rows, layout = laid_out(x)
        storage, whole = x.untyped_storage(), rows.is_contiguous() and rows.data_ptr() == x.data_ptr()
        memory = (x.numel(),) if whole else (x.shape, x.stride())
        form = kind.form(layout)
        key = (storage._cdata, x.storage_offset(), memory, x.dtype, x._version, type(form))
        found = self.packed.get(key)
        if found is None or found.source.expired():
            found = self.packed[key] = Packed(kind.parts(rows), StorageWeakRef(storage))
        saved.fill(form, found.parts)

    def offer(self, x: Tensor, rounded: Rounded, features: bool) -> None:
        """A linear layer keeps x [..., width] rounded: what waits for the same values takes that."""
        left = []
        for result, saved in self.waiting:
            if result.data_ptr() == x.data_ptr() and result.numel() == x.numel() and x.is_contiguous():
                saved.fill(OfLinear(laid_out(result)[1], features), rounded)
            else:
                left.append((result, saved))
        self.waiting = left

    def settle(self) -> None:
        """Round what no linear layer keeps."""
        for result, saved in self.waiting:
            self._pack(result, Kind(), saved)
        self.waiting.clear()


def _same(x: Tensor, outer: Hooks | None) -> Saved:
    made = Saved(None, [], outer)
    made.fill(Same(x._version if outer is None else None), (x.detach(),))
    return made


def _is_saving() -> bool:
    """Whether autograd saves tensors here, and no graph is traced."""
    allowed = torch.is_grad_enabled() and autograd._saved_tensors_hooks_is_enabled()
    return allowed and _get_current_dispatch_mode() is None


def _outer_hooks() -> Hooks | None:
    found = autograd._top_saved_tensors_default_hooks(False)
    return None if found is None else Hooks(*found)
