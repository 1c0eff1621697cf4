"""What lowering works on: buffers, lazy tensors (a function from indices to a scalar), and the steps of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from sylvester.codegen.index import Index, Loaded, Size, Var, atom, flatten, index, product
from sylvester.codegen.layout import PANEL, Format, FormatName, Layout
from sylvester.codegen.scalar import BYTES, Expr, Load

Indices = Sequence[Index]
Shape = tuple[Index, ...]
ReduceKind = Literal["sum", "prod", "max", "min", "argmax", "argmin", "any", "all"]
BufferKind = Literal["input", "weight", "state", "output", "arena"]
Arithmetic = Literal["f32", "bf16", "int8"]
POSITION = Size("position")
"""How many positions of the state are filled: known to the costs of a call, not to its plan."""


@dataclass(frozen=True)
class Buffer:
    """Contiguous row-major memory, or a stored weight: float32 [n, k] as ceil(n / 32) panels [k][32], or transposed."""

    name: str
    shape: Shape
    dtype: str
    kind: BufferKind
    key: str = ""
    layout: Layout | None = None

    @property
    def nbytes(self) -> Index:
        return product(self.shape) * BYTES[self.dtype]

    @property
    def elements(self) -> Index:
        """What memory holds of it: rows of a transposed weight are whole panels."""
        if self.layout is None or self.layout.kind != "columns":
            return product(self.shape)
        n, k = self.shape
        return (n + PANEL - 1) // PANEL * PANEL * k

    @property
    def packed(self) -> bool:
        """Whether a stored weight lies otherwise than row-major."""
        return self.layout is not None and self.layout.kind in ("panels", "columns")

    def offset(self, indices: Indices) -> Index:
        if not self.packed:
            return flatten(indices, self.shape)
        row, column = indices
        if self.layout is not None and self.layout.kind == "columns":
            return column * ((self.shape[0] + PANEL - 1) // PANEL * PANEL) + row
        return (row // PANEL * self.shape[1] + column) * PANEL + row % PANEL


@dataclass(frozen=True)
class Lazy:
    """A tensor that is computed where it is read; `load` gives the scalar at the indices."""

    shape: Shape
    dtype: str
    load: Callable[[Indices], Expr]
    norm: RowNorm | None = field(default=None, compare=False)
    """How a kernel may compute the rows itself, when the tensor is a norm or rotation of its last axis."""

    def at(self, indices: Indices) -> Expr:
        """The element that broadcasts to `indices` of a result of equal or higher rank."""
        own = indices[len(indices) - len(self.shape) :]
        return self.load([index(0) if n.constant == 1 else i for i, n in zip(own, self.shape, strict=True)])

    @cached_property
    def probe(self) -> tuple[list[Index], Expr]:
        """Index variables of its own and the element there."""
        indices = [atom(Var(f"q{d}", n)) for d, n in enumerate(self.shape)]
        return indices, self.load(indices)

    @property
    def operations(self) -> int:
        """Scalar operations per element."""
        return self.probe[1].operations


@dataclass(frozen=True)
class RowNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight ("rms"), or the same of x - mean(x), plus bias ("layer"), or x itself.

    The result is rotated by Hadamard matrices in blocks of `hadamard` features when that is not 0, or their transposes.
    """

    kind: Literal["rms", "layer", "none"]
    x: Lazy
    weight: Lazy | None = None
    bias: Lazy | None = None
    eps: float = 0.0
    hadamard: int = 0
    transposed: bool = False

    def __str__(self) -> str:
        parts = [f"{self.kind} norm"] if self.kind != "none" else []
        return " and ".join([*parts, *(["Hadamard rotation"] if self.hadamard else [])])


def of_buffer(buffer: Buffer) -> Lazy:
    return Lazy(buffer.shape, buffer.dtype, lambda i: Load(buffer.name, buffer.offset(i), buffer.dtype))


@dataclass(frozen=True)
class Strided:
    """A lazy tensor that is a view of one buffer: element i is at offset + sum(strides * i)."""

    buffer: str
    offset: Index
    strides: tuple[Index, ...]


def as_strided(tensor: Lazy) -> Strided | None:
    """The view that `tensor` is, or None when it computes something or its layout is not affine."""
    indices, element = tensor.probe
    if not isinstance(element, Load):
        return None
    strides, offset = [], element.offset
    for (((variable,), _),) in (i.terms for i in indices):
        strides.append(offset.coefficient(variable))
        offset = offset.substitute({variable: index(0)})
    affine = sum((s * i for s, i in zip(strides, indices, strict=True)), offset)
    if affine != element.offset or any(s.variables for s in strides) or offset.variables:
        return None
    if any(isinstance(a, Loaded) for part in (offset, *strides) for a in part.atoms):  # known in a loop nest only
        return None
    return Strided(element.buffer, offset, tuple(strides))


@dataclass(frozen=True)
class Store:
    """buffer[place(i)] = make(i) for every i in `shape`; `label`: the node it is for and its module, or several.

    `guard` of any step: the buffer of the number [1] that must not be above 0 for it to run.
    """

    buffer: str
    shape: Shape
    dtype: str
    make: Callable[[Indices], Expr]
    place: Callable[[Indices], Index]
    label: str = ""
    guard: str = ""


@dataclass(frozen=True)
class Reduce:
    """buffer[o] = reduction over i in `inner` of make(o, i), for every o in `outer`."""

    buffer: str
    outer: Shape
    inner: Shape
    dtype: str
    kind: ReduceKind
    make: Callable[[Indices, Indices], Expr]
    label: str = ""
    guard: str = ""


@dataclass(frozen=True)
class Pointer:
    """An operand of an extern kernel: element `offset` of a buffer."""

    buffer: str
    offset: Index
    dtype: str = "f32"


@dataclass(frozen=True)
class Extern:
    """A call of a kernel family instance. Arguments are pointers, sizes, floats as text, or None for a null pointer.

    `source` is the C text that the call needs, `scratch` a C function and its arguments giving bytes per thread, `work`
    the multiply-adds. `flops` (twice the work when not given) and `bytes` (each operand once) are what the kernel is
    measured by; both may depend on `POSITION`. `arithmetic` is the peak it is held against.
    """

    function: str
    source: str
    arguments: tuple[Pointer | Index | str | None, ...]
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    work: Index
    scratch: tuple[str, tuple[Index, ...]] | None = None
    flops: Index | None = None
    bytes: Index | None = None
    arithmetic: Arithmetic = "f32"
    formats: tuple[FormatName, ...] = ()
    """Weight formats whose kernels the source calls."""
    problem: tuple[str, str, tuple[Index, ...]] | None = None
    """What it may be tuned for: family, format and sizes."""
    finished: Callable[[Store], Extern] | None = field(default=None, compare=False)
    """The same call with elementwise work on its only result in it: the step that alone reads the result."""
    label: str = ""
    guard: str = ""


@dataclass(frozen=True)
class Linear:
    """outputs[w] [m, n] = rows [m, k] W_w^T + bias_w for one weight, or for several side by side (`ways`).

    `rows` are normalised first when there is a `norm`. `records` is memory for the rows in the format of the weights,
    `step` the stored scale of static ones.
    `epilogue` is a step that alone reads the outputs; its buffer takes the place of the first.
    """

    outputs: tuple[str, ...]
    rows: Pointer
    stride: Index
    weight: str
    bias: str | None
    records: str | None
    m: Index
    n: Index
    k: Index
    format: Format
    step: str | None = None
    norm: RowNorm | None = None
    parameters: tuple[str | None, str | None] = (None, None)
    """Buffers of the norm's weight and bias."""
    layers: int = 1
    """Linear layers of the graph that this is."""
    epilogue: Store | None = None
    label: str = ""
    guard: str = ""


Step = Store | Reduce | Extern | Linear


@dataclass
class Plan:
    """The lowered entry: what to run, over which buffers, in order."""

    name: str
    sizes: tuple[Size, ...]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def of_kind(self, kind: BufferKind) -> list[Buffer]:
        return [b for b in self.buffers.values() if b.kind == kind]
