"""How ops become kernel launches on a GPU; what no kernel family computes becomes generated loops, as on the CPU."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from sylvester.codegen import attention_calls, low_bit, skipping  # noqa: F401  (register what takes bfloat16)
from sylvester.codegen import dialect as _dialect  # noqa: F401
from sylvester.codegen.gpu_architectures import USUAL
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.index import Index, index
from sylvester.codegen.lazy import Extern, Lazy, Pointer
from sylvester.codegen.lowering import LOWERINGS, TAKES_BF16, Lower, Lowerer, Lowering
from sylvester.codegen.scalar import BYTES
from sylvester.codegen.shapes import DTYPES, SHORT, dtype_of, shape_of

dialect = torch.ops.sylvester
GPU_LOWERINGS: dict[Any, Lower] = {}
Option = TypeVar("Option")
NO_LIMIT = 2**31 - 1
Given = Pointer | Index | float
When = tuple[Index, int, int]
"""A size and the least and the most that it may be."""


@dataclass(frozen=True)
class Candidate:
    """Another kernel and its programs for the same arguments in the same order."""

    kernel: Kernel
    grid: tuple[Index, ...]


Others = Callable[[], tuple[Candidate, ...]]
"""Kernels that a launch may be tuned over besides its own, made when they are asked for."""


@dataclass(frozen=True)
class KernelCall(Extern):
    """A launch of a hand-written kernel: what its types name, and the programs that run. `when`: only at such sizes."""

    kernel: Kernel | None = None
    given: tuple[Given, ...] = ()
    grid: tuple[Index, ...] = field(default=())
    when: When | None = None
    others: Others = field(default=tuple, compare=False)


def gpu_lowers(*targets: Any) -> Callable[[Lowerer], Lowerer]:
    """As `lowers`, for GPUs only."""

    def register(function: Lowerer) -> Lowerer:
        GPU_LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register


class GpuLowering(Lowering):
    """Every op by its kernel on a GPU, or by the lowering to loops that all targets share."""

    target: ClassVar[str] = "cuda"
    table: ClassVar[Mapping[Any, Lower]] = ChainMap(GPU_LOWERINGS, LOWERINGS)
    takes_bf16: ClassVar[Collection[Any]] = {*TAKES_BF16, dialect.linear_bf16.default}
    takes_short: ClassVar[Collection[Any]] = {
        getattr(dialect, name).default for name in ("linear_fp16", "widen_fp16", "linear_fp8", "dequantize_fp8")
    }
    dtypes: ClassVar[Mapping[torch.dtype, str]] = {**DTYPES, **SHORT}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.archs: Sequence[str] = USUAL
        """Architectures that kernels must run on."""
        self.steady = False
        """Whether up to 16 tokens of a row, 64 in all, that are read together must have the bits of single ones."""
        self.trees = False
        """Whether those of a tree of drafts must, too."""
        self.notes: dict[str, None] = {}
        """What the ledger is to say, once each."""
        self.constants: dict[str, Tensor] = {}
        """Stored tensors that kernels need and the program does not have, by key."""
        self.node: fx.Node | None = None
        """The one that is being lowered."""

    def _call(self, node: fx.Node) -> Any:
        self.node = node
        return super()._call(node)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[Index, ...],
        given: Mapping[str, Given],
        writes: tuple[str, ...],
        when: When | None = None,
        others: Others = tuple,
        changes: bool = False,
    ) -> None:
        """Append a launch; `given` may have more than the kernel takes. `changes`: it reads what it writes."""
        kernel = aligned(kernel, given)
        arguments = tuple(given[name] for name in kernel.types)
        reads = tuple(a.buffer for a in arguments if isinstance(a, Pointer) and (changes or a.buffer not in writes))
        call = KernelCall(
            kernel.function, "", (), writes, reads, index(0), kernel=kernel, given=arguments, grid=grid, when=when,
            others=others,
        )  # fmt: skip
        self.plan.steps.append(call)

    def tuned(
        self,
        options: Sequence[Option],
        make: Callable[[Option], Candidate],
        given: Mapping[str, Given],
        writes: tuple[str, ...],
        when: When | None = None,
    ) -> None:
        """Append a launch of the first option, which may be tuned over the others."""
        first = make(options[0])
        own = aligned(first.kernel, given).key

        def others() -> tuple[Candidate, ...]:
            made = (replace(c, kernel=aligned(c.kernel, given)) for c in map(make, options))
            return tuple(candidate for key, candidate in {c.kernel.key: c for c in made}.items() if key != own)

        self.launch(first.kernel, first.grid, given, writes, when, others)

    def constant(self, tensor: Tensor, key: str) -> str:
        """The buffer of a tensor that is stored beside the weights."""
        found = next((b.name for b in self.plan.of_kind("weight") if b.key == key), None)
        self.constants[key] = tensor
        return found or self.buffer("weight", shape_of(tensor), dtype_of(tensor.dtype), key).name


def aligned(kernel: Kernel, given: Mapping[str, Given]) -> Kernel:
    """The kernel for arguments that are multiples of 16 where these are, of bytes for addresses: memory begins on so
    many."""
    return replace(kernel, aligned=tuple(name for name in kernel.types if _whole(given[name])))


def _whole(given: Given) -> bool:
    size, found = (BYTES[given.dtype], given.offset) if isinstance(given, Pointer) else (1, given)
    return isinstance(found, Index) and all(factor * size % 16 == 0 for _, factor in found.terms)


def stored(lowering: Lowering, x: Lazy) -> Pointer:
    """Memory that holds exactly x, row-major."""
    buffer = lowering.contiguous(x)
    return Pointer(buffer.name, index(0), buffer.dtype)


def over(total: Index, part: int) -> Index:
    """How many parts there are, the last one perhaps not whole."""
    return (total + (part - 1)) // part
