"""Linear layers for GPUs on random tensors, and what they compute in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.codegen.gpu_matmul import Linear, Tile, finish, finish_grid, gemv, gemv_grid, grid, kernel
from sylvester.compiler.packing import packed3, packed4
from sylvester.compiler.quantized_ops import dequantize_w3, dequantize_w4, dequantize_w8
from sylvester.compiler.quantized_rows import float8_rows, quantize_rows
from tests.gpu import TYPES, run

DTYPES = {name: dtype for dtype, name in TYPES.items()}
WIDEN = {"i8": dequantize_w8, "i4": dequantize_w4, "i3": dequantize_w3}
ACTIVATIONS = {
    "none": lambda v: v,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Stored:
    """A weight in memory, and the float64 one that it stands for."""

    weight: Tensor
    scales: Tensor | None
    wide: Tensor


def stored(linear: Linear, n: int, k: int) -> Stored:
    w = torch.randn(n, k)
    if linear.whole:
        most = {"i8": 127, "i4": 7, "i3": 3}[linear.weight]
        numbers = torch.randint(-most - (linear.weight != "i8"), most + 1, (n, k), dtype=torch.int8)
        packed = {"i8": lambda v: v, "i4": packed4, "i3": packed3}[linear.weight](numbers)
        groups = -(-k // linear.group) if linear.group else 1
        scales = (torch.randn(n, groups) / most).to(DTYPES[linear.scales])
        return Stored(packed, scales, WIDEN[linear.weight].reference(packed, scales.double()))
    if linear.weight == "fp8e4nv":
        scales = (w.abs().amax(1, keepdim=True) / 448).float()
        rounded = (w / scales).to(torch.float8_e4m3fn)
        return Stored(rounded, scales, rounded.double() * scales)
    rounded = w.to(DTYPES[linear.weight])
    return Stored(rounded, None, rounded.double())


def normalised(linear: Linear, x: Tensor, held: dict[str, Tensor]) -> Tensor:
    if linear.norm is None:
        return x
    weight, bias = (held[name].double() if name in held else None for name in ("norm_weight", "norm_bias"))
    if linear.norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, linear.norm.eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + linear.norm.eps)
    return y if weight is None else y * weight


def inputs(linear: Linear, m: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """x with what reads it, and the float64 rows that are multiplied."""
    x = torch.randn(m, k)
    step = torch.tensor([0.03])
    if linear.rounding == "given" and linear.x == "fp8e4nv":
        scale = x.abs().amax(1, keepdim=True) / 448
        numbers = (x / scale).to(torch.float8_e4m3fn)
        return {"x": numbers, "x_scales": scale}, numbers.double() * scale
    if linear.rounding == "given":
        whole, scale = quantize_rows(x, linear.bits)
        return {"x": whole.to(torch.int8), "x_scales": scale}, whole.double() * scale
    x = x.to(DTYPES[linear.x])
    held = {name: torch.randn(k).to(DTYPES[t]) for name, t in norm_types(linear).items()}
    rows = normalised(linear, x.double(), held)
    if linear.rounding == "step":
        held["x_scales"] = step
    return {"x": x, **held}, rounded(linear, rows, step if linear.rounding == "step" else None)


def norm_types(linear: Linear) -> dict[str, str]:
    norm = linear.norm
    return {n: t for n, t in (("norm_weight", norm.weight), ("norm_bias", norm.bias)) if t} if norm else {}


def rounded(linear: Linear, rows: Tensor, step: Tensor | None) -> Tensor:
    if linear.rounding == "none":
        return rows.to(DTYPES[linear.type]).double()
    if linear.type == "fp8e4nv" and step is None:
        numbers, scale = float8_rows(rows)
        return numbers.double() * scale
    if linear.type == "fp8e4nv":
        return (rows.float() / step).clamp(-448, 448).to(torch.float8_e4m3fn).double() * step
    numbers, scale = quantize_rows(rows, linear.bits, step)
    return numbers.double() * scale


def problem(linear: Linear, m: int, n: int, k: int) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the kernel but y, and the result in float64."""
    arguments, rows = inputs(linear, m, k)
    w = stored(linear, n, k)
    arguments["w"] = w.weight
    sums = rows @ w.wide.T
    if w.scales is not None:
        arguments["scales"] = w.scales
    if linear.bias:
        arguments["bias"] = torch.randn(n).to(DTYPES[linear.bias])
        sums = sums + arguments["bias"].double()
    y = ACTIVATIONS[linear.activation](sums)
    if linear.gated:
        up = stored(linear, n, k)
        arguments["up"] = up.weight
        sums = rows @ up.wide.T
        if up.scales is not None:
            arguments["up_scales"] = up.scales
        if linear.bias:
            arguments["up_bias"] = torch.randn(n).to(DTYPES[linear.bias])
            sums = sums + arguments["up_bias"].double()
        y = y * sums
    if linear.residual:
        arguments["residual"] = torch.randn(m, n).to(DTYPES[linear.residual])
        y = y + arguments["residual"].double()
    return arguments, y


def result(linear: Linear, tile: Tile, arguments: dict[str, Any], n: int, *, rows_at_once: bool = False) -> Tensor:
    """y by the kernels; `rows_at_once` for the one without tensor cores."""
    m, k = arguments["x"].shape
    sizes = {"m": m, "n": n, "k": k, "x_row": k, "w_row": arguments["w"].shape[1], "y_row": n, "residual_row": n}
    made = gemv(linear, tile, m, k) if rows_at_once else kernel(linear, tile, k)
    programs = gemv_grid(tile, n) if rows_at_once else grid(tile, m, n)
    y = torch.full((m, n), float("nan")).to(DTYPES[linear.y])
    if tile.splits == 1:
        run(made, programs, **arguments, **sizes, y=y)
        return y
    parts = torch.full((tile.splits, 1 + linear.gated, m, n), float("nan"))
    run(made, programs, **arguments, **sizes, y=parts)
    second = finish(linear, tile.splits)
    held = {name: v for name, v in (arguments | sizes).items() if name in second.types}
    run(second, finish_grid(m, n), **held, parts=parts, y=y)
    return y
