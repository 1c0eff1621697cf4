"""Kernels for GPUs of y = x H^T / sqrt(block), alone or with the rounding of its rows, in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sylvester.codegen.gpu_kernel import Constant, Kernel, text
from sylvester.codegen.gpu_matmul import FLOATS, LARGEST
from sylvester.compiler.errors import CompileError
from sylvester.compiler.hadamard import Scheme, scheme_of
from sylvester.compiler.hadamard import base as base_matrix

WHOLE = 128
"""The largest block that is one row of a matrix."""
INNER = {"bf16": 64, "fp16": 64, "fp32": 32}
"""The most columns that a larger one has: more need more registers than there are."""
HELD, HELD_ROUNDED = 1 << 14, 1 << 15
"""The most values that one program holds; a whole row where it is rounded."""
TERMS_OF_X = {"bf16": 1, "fp16": 2, "fp32": 3}
TERMS = {"bf16": 2, "fp16": 2, "fp32": 3}
"""Numbers in bfloat16 that make up x, and what comes between the products."""
DEPTH = 16
"""Rows of x that are read at a time."""


HELD_ROWS = 64
"""The most rows of a block that is held as [rows, B, A]."""


@dataclass(frozen=True)
class Hadamard:
    """Blocks of rows of memory of `width` values; types are those of memory. `bits` of int8 numbers, 0: floats y."""

    x: str
    y: str
    width: int
    block: int
    transposed: bool = False
    bits: int = 0
    step: bool = False

    def __post_init__(self) -> None:
        if self.x not in FLOATS or self.y not in (("i8",) if self.bits else FLOATS) or self.bits not in (0, *LARGEST):
            raise CompileError(
                f"found a rotation of {self.x!r} to {self.y!r} of {self.bits} bits, expected {list(FLOATS)} to these, "
                f"or to 'i8' of one of {list(LARGEST)} bits"
            )
        if self.block < 1 or self.width % self.block:
            raise CompileError(f"found blocks of {self.block} in rows of {self.width}, expected a divisor")
        if self.bits and not fuses(self.x, self.width, self.block):
            raise CompileError(
                f"found rows of {self.width} in blocks of {self.block} to round in the same pass, expected at most "
                f"{HELD_ROUNDED} values as they are padded; round them by quantize_rows"
            )

    @property
    def columns(self) -> int:
        """W of blocks [R, W]."""
        return self.block if self.block <= WHOLE else min(1 << scheme_of(self.block).k, INNER[self.x])

    @property
    def rows(self) -> int:
        """R."""
        return self.block // self.columns

    @property
    def axes(self) -> tuple[int, int, int] | None:
        """R, B, A of a block that a program holds as [R, B, A], or None: in float32 three products spill registers."""
        if self.rows <= HELD_ROWS or self.x == "fp32" or (self.bits and self.width > self.block):
            return None
        found = scheme_of(self.block)
        free = 4 if found.order == 1 else 0
        a, b = (found.k - free + 1) // 2, (found.k - free) // 2
        if found.order > HELD_ROWS or not 4 <= b <= a <= 6:
            return None
        held = _padded(found.order << free) << a + b
        return (found.order << free, 1 << b, 1 << a) if held <= HELD else None

    @property
    def blocks(self) -> int:
        """Of one program: those of a row where it is rounded, else as many as keep tensor cores busy."""
        if self.bits:
            return self.width // self.block
        if self.axes:
            return 1
        wanted = 64 if self.rows == 1 and self.x != "fp32" else 16
        return max(1, wanted // self.rows)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that a program holds, padded."""
        if self.axes:
            rows, b, a = self.axes
            return _padded(rows), a * b
        rows, columns = _padded(self.blocks * self.rows), _padded(self.columns)
        return (rows if self.bits else min(rows, HELD // columns)), columns


def fuses(x: str, width: int, block: int) -> bool:
    """Whether a program can hold a row of x, which it rounds when all of it is there."""
    made = Hadamard(x, "fp32", width, block)
    return _padded(width // made.columns) * _padded(made.columns) <= HELD_ROUNDED


def kernel(rotation: Hadamard) -> Kernel:
    """Arguments x, y, scales (rounded rows), base (see `base`), and sizes blocks, x_row, y_row."""
    found = scheme_of(rotation.block)
    types = {"x": f"*{rotation.x}", "y": f"*{rotation.y}"}
    types |= {"scales": "*fp32"} if rotation.bits else {}
    types |= {"base": "*i8"} if found.bases else {}
    types |= dict.fromkeys(("blocks", "x_row", "y_row"), "i32")
    constants: dict[str, Constant] = dict.fromkeys((n for n in ("scales", "base") if n not in types), 0)
    constants |= {
        "FACTOR": rotation.block**-0.5,
        "PER_ROW": rotation.width // rotation.block,
        "TURNED": rotation.transposed,
        "H": found.order,
        "TERMS_OF_X": TERMS_OF_X[rotation.x],
        "TERMS": TERMS[rotation.x],
        "MOST": LARGEST[rotation.bits] if rotation.bits else 0,
        "STEP": rotation.step,
    }
    shape = _held(*rotation.axes, found) if rotation.axes else _streamed(rotation, found)
    aligned = ("x", "y", *(("x_row", "y_row") if rotation.width % 16 == 0 else ()))
    rows, columns = rotation.tile
    warps = 8 if rotation.axes else max(4, min(16, rows * columns // 1024))
    name = "hadamard_held" if rotation.axes else "hadamard"
    return Kernel(text("hadamard"), name, types, constants | shape, aligned, warps, stages=2)


def _held(rows: int, b: int, a: int, found: Scheme) -> dict[str, Constant]:
    logs = {
        "A_LOG": a.bit_length() - 1,
        "B_LOG": b.bit_length() - 1,
        "LOG": 0 if found.bases else rows.bit_length() - 1,
    }
    return {"R": rows, "A": a, "B": b, **logs, "ROWS": _padded(rows)}


def _streamed(rotation: Hadamard, found: Scheme) -> dict[str, Constant]:
    """Of the kernel that reads some rows of a block at a time."""
    whole, inner = rotation.rows == 1, rotation.columns.bit_length() - 1
    rows, columns = rotation.tile
    return {
        "R": rotation.rows,
        "W": rotation.columns,
        "BLOCKS": rotation.blocks,
        "LOG": 0 if whole else found.k - inner,
        "INNER_H": found.order if whole else 1,
        "INNER_LOG": found.k if whole else inner,
        "ROWS": rows,
        "COLUMNS": columns,
        "DEPTH": DEPTH,
    }


def candidates(rotation: Hadamard) -> tuple[Kernel, ...]:
    """Kernels that it may be tuned over, the default first."""
    first = kernel(rotation)
    warps = [w for w in (first.warps // 2, first.warps * 2) if 2 <= w <= 16]
    deeper = replace(first, constants={**first.constants, "DEPTH": 2 * DEPTH})
    others = (replace(first, warps=w) for w in warps)
    streamed = rotation.rows > 1 and not rotation.axes
    return (first, *others, *((deeper, replace(deeper, stages=3)) if streamed else ()))


def base(block: int) -> Tensor | None:
    """int8 [H, H], the argument `base`; None for powers of two, whose kernel has none."""
    found = scheme_of(block)
    return base_matrix(found.order) if found.bases else None


def grid(rotation: Hadamard, rows: int) -> tuple[int, int]:
    """For so many rows of memory."""
    blocks = rows * (rotation.width // rotation.block)
    parts = 1 if rotation.axes else -(-rotation.blocks * rotation.rows // rotation.tile[0])
    return -(-blocks // rotation.blocks), parts


def _padded(n: int) -> int:
    """A power of two that a dot product takes."""
    return max(16, 1 << (n - 1).bit_length())
