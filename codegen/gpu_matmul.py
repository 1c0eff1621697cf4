"""Kernels for GPUs of linear layers: y = residual + act(x W^T + bias) (x U^T + bias), from a norm to a residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sylvester.codegen.gpu_kernel import Constant, Kernel, text
from sylvester.compiler.errors import CompileError
from sylvester.compiler.quantized_ops import GROUPS

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8e4nv": 8, "i8": 8, "i4": 4, "i3": 3}
"""Of a stored weight; "i4" and "i3" are packed in uint8 as compiler/packing.py says."""
FLOATS = ("fp32", "bf16", "fp16")
LARGEST, LARGEST_FLOAT8 = {4: 7, 8: 127}, 448
"""What rows are cut at: whole numbers by their bits, and float8."""
DEEPEST = ((1 << 31) - 1) // (128 * 127)
"""The depth to which products of whole numbers fit into 32 bits."""
MOST_ROWS = 4
"""Of x in a product without tensor cores."""
SIZES = ("m", "n", "k", "x_row", "w_row", "y_row", "residual_row")
POINTERS = (
    *("x", "w", "up", "y", "scales", "up_scales", "x_scales", "norm_weight", "norm_bias", "bias", "up_bias"),
    "residual",
)


@dataclass(frozen=True)
class Norm:
    """Of the rows of x; `weight` and `bias` are dtypes, or "" where there is none."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Linear:
    """What is multiplied and what surrounds it. Types are those of memory, as Triton writes them; "" is absent.

    Integer weights have float scales, one a row (`group` 0) or one a `group` of columns; fp8 ones have one a row.
    `rounding` of x: "none" multiplies floats; "given" reads int8 or fp8 x with scales x_scales [m]; "rows" finds them
    (`quantize_rows` of `bits`, or `float8_rows`); "step" divides by the one number of x_scales. Without it, integer
    weights are multiplied in the type of x: the meaning of 16 bits in linear_w8, and closer to the float product.
    `gated`: W and U of one type, y = act(x W^T + bias) (x U^T + up_bias).
    `turned`: memory holds W^T [k, w_row]. `opening`: y = a (x W^T + bias), a that activation of a gate [m, n], and 0
    where |a| is at most its threshold [n].
    """

    x: str
    weight: str
    y: str
    group: int = 0
    scales: str = "fp32"
    rounding: Literal["none", "given", "rows", "step"] = "none"
    bits: int = 8
    norm: Norm | None = None
    bias: str = ""
    activation: Literal["none", "silu", "gelu", "gelu_tanh", "relu"] = "none"
    gated: bool = False
    residual: str = ""
    precision: Literal["tf32x3", "ieee"] = "tf32x3"
    turned: bool = False
    opening: Literal["", "silu", "gelu", "gelu_tanh"] = ""

    def __post_init__(self) -> None:
        self._require(self.weight in BITS, f"a weight in {self.weight!r}", f"one of {list(BITS)}")
        self._require(self.group == 0 or (self.group in GROUPS and self.whole), f"groups of {self.group}",
                      f"0, or {GROUPS} of whole numbers")  # fmt: skip
        self._require(self.bits in LARGEST, f"rows of {self.bits} bits", f"one of {list(LARGEST)}, or no rounding")
        stored = (*FLOATS, "i8", "fp8e4nv") if self.rounding == "given" else FLOATS
        self._require(self.x in stored, f"x in {self.x!r}", f"one of {list(stored)}")
        if self.rounding == "given":
            wanted = "fp8e4nv" if self.weight == "fp8e4nv" else "i8"
            self._require(self.x == wanted and self.norm is None, f"x in {self.x!r} with its scales",
                          f"{wanted!r} without a norm")  # fmt: skip
        rounded = self.whole or self.weight == "fp8e4nv"
        self._require(rounded or self.rounding == "none", f"rounded rows for a weight in {self.weight}", "floats")
        self._require(self.weight != "fp8e4nv" or self.rounding != "none", "floats for an fp8 weight", "rounded rows")

        plain = self.weight == self.x == "fp32" and not (self.turned and self.opening)
        self._require(plain or not (self.turned or self.opening), f"{self.x} rows of a weight in {self.weight}",
                      "float32, either turned or opened by a gate")  # fmt: skip

    def _require(self, held: bool, found: str, expected: str) -> None:
        if not held:
            raise CompileError(f"a linear layer on a GPU has {found}, expected {expected}")

    @property
    def plain(self) -> Linear:
        """It with nothing after the bias."""
        return replace(self, activation="none", gated=False, residual="", opening="")

    @property
    def whole(self) -> bool:
        return self.weight in ("i8", "i4", "i3")

    @property
    def type(self) -> str:
        """Of what is multiplied."""
        if self.whole:
            return self.x if self.rounding == "none" else "i8"
        return self.weight

    def types(self) -> dict[str, str]:
        """Of the arguments that there are."""
        stored = "u8" if self.weight in ("i4", "i3") else self.weight
        scales = self.scales if self.whole or self.weight == "fp8e4nv" else ""
        norm = self.norm
        held = (
            *(self.x, stored, stored if self.gated else "", self.y, scales, scales if self.gated else ""),
            *("fp32" if self.rounding in ("given", "step") else "", norm.weight if norm else ""),
            *(norm.bias if norm else "", self.bias, self.bias if self.gated else "", self.residual),
        )
        return {name: f"*{held}" for name, held in zip(POINTERS, held, strict=True) if held} | dict.fromkeys(
            SIZES, "i32"
        )

    def constants(self) -> dict[str, Constant]:
        """Of the prologue and the sums; absent pointers are 0."""
        norm = self.norm
        absent = dict.fromkeys((p for p in POINTERS if p not in self.types()), 0)
        return {
            **absent,
            "eps": norm.eps if norm else 0.0,
            "BITS": BITS[self.weight],
            "GROUP": self.group,
            "SCALED": self.whole or self.weight == "fp8e4nv",
            "TYPE": self.type,
            "NORM": norm.kind if norm else "none",
            "WEIGHTED": bool(norm and norm.weight),
            "SHIFTED": bool(norm and norm.bias),
            "ROUND": self.rounding,
            "MOST": {"i8": LARGEST[self.bits], "fp8e4nv": LARGEST_FLOAT8}.get(self.type, 0),
        }

    def epilogue(self) -> dict[str, Constant]:
        return {
            "BIASED": bool(self.bias),
            "ACTIVATION": self.activation,
            "GATED": self.gated,
            "ADDED": bool(self.residual),
        }


@dataclass(frozen=True)
class Tile:
    """How a product is cut up: a program has m x n of y, in steps of k; `splits` programs share the depth."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    splits: int = 1
    group_m: int = 8


FINISH_M, FINISH_N = 1, 512
APART, WAYS = ("w", "y", "scales", "bias", "n"), ("b", "c")
"""Arguments that differ between products that run together, and how those after the first are called."""


def is_gemv(m: int) -> bool:
    """Whether m rows are few enough for `gemv`."""
    return m <= MOST_ROWS


def aligned_of(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The argument `aligned` where every pointer is a multiple of 16 bytes: with sizes that are, loads are wide."""
    return (*POINTERS, *(name for name, size in sizes.items() if size % 16 == 0))


def kernel(linear: Linear, tile: Tile, k: int, aligned: tuple[str, ...] = ()) -> Kernel:
    """The product on tensor cores, for any number of rows. `aligned` sizes and pointers are multiples of 16."""
    step = _step(linear, tile.k)
    fixed: dict[str, Constant] = {
        "PRECISION": linear.precision,
        "TURNED": linear.turned,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "GROUP_M": tile.group_m,
    }
    return _kernel("matmul", linear, tile, k, aligned, fixed | {"BLOCK_K": step})


def gemv(linear: Linear, tile: Tile, m: int, k: int, aligned: tuple[str, ...] = ()) -> Kernel:
    """The product of at most `MOST_ROWS` rows."""
    if not is_gemv(m):
        raise CompileError(f"found {m} rows for a product without tensor cores, expected at most {MOST_ROWS}")
    lanes = linear.group or {32: 4, 16: 8}.get(BITS[linear.weight], 16)
    rows = 1 << (m - 1).bit_length()
    fixed: dict[str, Constant] = {"ROWS": rows, "BLOCK_N": tile.n, "BLOCK_K": max(tile.k, lanes), "LANES": lanes}
    return _kernel("gemv", linear, tile, k, aligned, fixed)


def gemv_group(linear: Linear, tile: Tile, m: int, k: int) -> Kernel:
    """The products of at most `MOST_ROWS` rows with two or three weights of a form: those after the first are w_b and
    w_c, with their y, scales, bias and n. The grid is `gemv_grid` of each, added up."""
    if linear != linear.plain or tile.splits > 1:
        raise CompileError("products that run together have nothing after their bias, and no splits")
    one = gemv(linear, tile, m, k)
    types: dict[str, str] = {}
    absent: dict[str, Constant] = {}
    for name, held in one.types.items():
        types |= dict.fromkeys((name, *(f"{name}_{way}" for way in WAYS if name in APART)), held)
    for name in APART:
        absent |= {f"{name}_{way}": 0 for way in WAYS if name not in types}
    return replace(one, function="gemv_group", types=types, constants={**one.constants, **absent})


def finish(linear: Linear, splits: int, aligned: tuple[str, ...] = ()) -> Kernel:
    """Adds up the float32 sums [splits, 2 if gated else 1, m, n] of split products, in their order."""
    held = {name: t for name, t in linear.types().items() if name in ("y", "bias", "up_bias", "residual")}
    types = {"parts": "*fp32", **held} | dict.fromkeys(("m", "n", "y_row", "residual_row"), "i32")
    absent = dict.fromkeys((p for p in ("bias", "up_bias", "residual") if p not in types), 0)
    fixed = linear.epilogue() | {"SPLITS": splits, "BLOCK_M": FINISH_M, "BLOCK_N": FINISH_N}
    return Kernel(text("epilogue"), "join", types, absent | fixed, _present(aligned, types))


def grid(tile: Tile, m: int, n: int) -> tuple[int, int]:
    """Programs of `kernel`."""
    return -(-m // tile.m) * -(-n // tile.n), tile.splits


def gemv_grid(tile: Tile, n: int) -> tuple[int, int]:
    return -(-n // tile.n), tile.splits


def finish_grid(m: int, n: int) -> tuple[int, int]:
    return -(-m // FINISH_M), -(-n // FINISH_N)


def parts_bytes(linear: Linear, splits: int, m: int, n: int) -> int:
    """Of the scratch that split products are written to, as their `y`; 0 without splits."""
    return 0 if splits == 1 else 4 * splits * (2 if linear.gated else 1) * m * n


def _kernel(
    name: str, linear: Linear, tile: Tile, k: int, aligned: tuple[str, ...], fixed: Mapping[str, Constant]
) -> Kernel:
    if linear.type == "i8" and linear.group == 0 and k > DEEPEST:
        raise CompileError(f"found whole numbers to a depth of {k}, expected at most {DEEPEST}, or groups of columns")
    types = linear.types()
    if tile.splits > 1:
        types["y"] = "*fp32"
    even = k % (int(fixed["BLOCK_K"]) * tile.splits) == 0
    constants = {**linear.constants(), **linear.epilogue(), **fixed, "EVEN": even, "SPLITS": tile.splits}
    return Kernel(text(name), name, types, constants, _present(aligned, types), tile.warps, tile.stages)


def _present(aligned: tuple[str, ...], types: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in aligned if name in types)


def _step(linear: Linear, k: int) -> int:
    """A step of the depth lies in one group of columns, and is what a dot product takes at least."""
    least = 32 if BITS[linear.type] == 8 else 16
    return max(least, min(k, linear.group) if linear.group else k)
