"""Weights that FSDP2 gathers rounded: 8 bits a value, one scale for all ranks (HALO, Ashkboos et al., 2025).

A rank holds whole rows of W as they are. It rounds those of W R by the largest value of all ranks and gives the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_ops import HALO_LINEAR, halo_linear, rounded_weight
from sylvester.compiler.halo_quantise import Rounded, require_finite

aten = torch.ops.aten
VIEWS = frozenset({
    aten.detach.default, aten.alias.default, aten.view.default, aten.slice.Tensor, aten.split.Tensor,
    aten.as_strided.default, aten.new_zeros.default, aten._to_copy.default,
})  # fmt: skip
"""What FSDP2 makes shards of parameters with; the results of all else are plain tensors."""
Gather = tuple[tuple[Tensor, ...], tuple[Tensor, torch.Size]]


@dataclass
class Weight:
    """What all shards of a weight share; it is [out, in], or [in, out] where `turned`.

    `rounded` are the rows of this rank [out, in], until the weight is written to.
    """

    name: str
    level: int
    format: str
    turned: bool
    rounded: Rounded | None = None


@dataclass
class Group:
    """Weights that are gathered at one time, as modules with names of parameters: their scales take one message."""

    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def round(self, mesh: DeviceMesh) -> None:
        """Round the rows of this rank. Every rank raises where the weights of one hold a NaN."""
        locals_ = (cast(Any, module._parameters[name])._local_tensor for module, name in self.places)
        shards = [shard for shard in locals_ if shard.weight.rounded is None]
        own = [_alone(shard) for shard in shards]
        scales = torch.stack([scale for _, scale in own])
        if mesh.size() > 1:
            dist.all_reduce(scales, dist.ReduceOp.MAX, mesh.get_group())
        for shard, alone, scale in zip(shards, own, scales.unbind(), strict=True):
            require_finite(scale, f"the weight of the layer {shard.weight.name!r}")
            shard.weight.rounded = alone if mesh.size() == 1 else shard.rows(scale)


def _alone(shard: Shard) -> Rounded:
    """The rows with their own scale; it is infinite for a NaN, which the maximum over ranks may lose."""
    try:
        found = shard.rows()
    except CompileError:
        return Rounded(shard.plain, torch.tensor(torch.inf))
    return Rounded(found.values, found.scale.nan_to_num(nan=torch.inf, posinf=torch.inf))


class Shard(Tensor):
    """A parameter or the rows that a rank holds of it: a plain tensor that FSDP2 gathers rounded."""

    plain: Tensor
    weight: Weight
    group: Group

    @staticmethod
    def __new__(cls, plain: Tensor, weight: Weight, group: Group) -> Shard:
        made = _wrapper(cls, plain, plain.dtype)
        made.plain, made.weight, made.group = plain, weight, group
        return cast(Shard, made)

    def __init__(self, plain: Tensor, weight: Weight, group: Group) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Shard({self.plain!r})"

    def rows(self, scale: Tensor | None = None) -> Rounded:
        """The rows of W R [out, in], rounded with their own scale or that of all ranks."""
        weight, rows = self.weight, self.plain.t() if self.weight.turned else self.plain
        return rounded_weight(rows, weight.level, weight.format, scale, weight.name)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        shards = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Shard)]
        plain, named = pytree.tree_map_only(Shard, lambda shard: shard.plain, (args, kwargs or {}))
        result = func(*plain, **named)
        if func._schema.is_mutable:
            for shard in shards:
                shard.weight.rounded = None
            return args[0] if func._schema.returns else None
        if func in VIEWS:
            return pytree.tree_map_only(Tensor, lambda t: Shard(t, shards[0].weight, shards[0].group), result)
        return result

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> Gather:
        """What is sent of this shard, as many rows as every rank sends, and the scale."""
        weight = self.weight
        if weight.rounded is None:
            self.group.round(mesh)
        values, scale = cast(Rounded, weight.rounded)
        if weight.turned:
            return (values.t().contiguous(),), (scale, outer_size)
        rows = -(-outer_size[0] // mesh.size())
        sent = (
            values if len(values) == rows else torch.cat([values, values.new_zeros(rows - len(values), outer_size[1])])
        )
        return (packed(sent) if packs(weight, outer_size, mesh.size()) else sent,), (scale, outer_size)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], given: tuple[Tensor, torch.Size], dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight on memory that FSDP2 frees and fills again; with `out`, the one that was made before."""
        (sent,), (scale, size) = outputs, given
        whole = sent.numel() >= size.numel()
        if out is None:
            values = sent.view(-1)[: size.numel()].view(size) if whole else unpacked(sent).view(size)
            return Gathered(Rounded(values, scale), dtype), () if whole else (values,)
        values = out.rounded.values
        out.rounded = Rounded(values, scale)
        if not whole:
            with _unsafe_preserve_version_counter(values):
                values.copy_(unpacked(sent).view(size))
        return None


class Gathered(Tensor):
    """A whole weight as its rounded values; only `halo_linear` reads it, and it takes the gradient."""

    rounded: Rounded

    @staticmethod
    def __new__(cls, rounded: Rounded, dtype: torch.dtype) -> Gathered:
        made = _wrapper(cls, rounded.values, dtype)
        made.rounded = rounded
        return cast(Gathered, made)

    def __init__(self, rounded: Rounded, dtype: torch.dtype) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Gathered({self.rounded!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not HALO_LINEAR:
            return cast(Any, super()).__torch_function__(func, types, args, kwargs)
        x, weight, bias, level, format, name, _, _, x_values, x_scale = (*args, *(None,) * 4)[:10]
        values, scale = weight.rounded
        with torch._C.DisableTorchFunctionSubclass():
            return halo_linear(x, weight, bias, level, format, name, values, scale, x_values, x_scale)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight: Gathered = args[0]
        same = func in (aten.detach.default, aten.alias.default)
        if func is aten.as_strided.default:
            same = tuple(args[1]) == weight.shape and tuple(args[2]) == weight.stride()
        if same or func is aten.t.default:
            values, scale = weight.rounded
            return Gathered(Rounded(values if same else values.t(), scale), weight.dtype)
        if func is aten.zeros_like.default:
            return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        raise NotImplementedError(f"{func} reads a weight that was gathered rounded, which only linear layers do")


def _wrapper(cls: type[Tensor], like: Tensor, dtype: torch.dtype) -> Any:
    make = cast(Callable[..., Any], Tensor._make_wrapper_subclass)
    return make(
        cls, like.size(), strides=like.stride(), storage_offset=like.storage_offset(), dtype=dtype, device=like.device
    )


def packs(weight: Weight, size: torch.Size, ranks: int) -> bool:
    """Whether two values of 4 bits go in a byte; FSDP2 lets ranks with fewer rows send no fewer bytes than rows."""
    return weight.format == "int4" and not weight.turned and size[1] % 2 == 0 and size[0] % ranks == 0


def packed(values: Tensor) -> Tensor:
    """[rows, in] of -7..7 -> [rows, in / 2] bytes, the even columns in the low half."""
    return (values[:, 0::2] & 15) | (values[:, 1::2] << 4)


def unpacked(bytes_: Tensor) -> Tensor:
    """What was packed, flat."""
    return torch.stack([(bytes_ << 4) >> 4, bytes_ >> 4], -1).flatten()
