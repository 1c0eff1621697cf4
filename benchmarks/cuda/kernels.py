"""Single kernels beside what bounds them: rotation with rounding beside a copy, int8 attention beside PyTorch's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sylvester as sv
from benchmarks.cuda.machine import Machine
from sylvester.backends.cuda import emulated
from sylvester.backends.cuda.compile import build
from sylvester.codegen import gpu_hadamard

RATIO_OF_COPY, RATIO_OF_ATTENTION = 1.3, 1.3
RUNS = 20
WRONG = 0.1


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a kernel and of what it is compared with; `goal` is the least or the most of their ratio."""

    name: str
    ours: float
    other: float
    goal: str
    met: bool


def all_of(machine: Machine) -> Iterator[Measured]:
    """At the sizes of the goals, or tiny ones in a rehearsal."""
    yield rotation(machine, *((8, 64) if machine.rehearsal else (8192, 4096)))
    yield attention(machine, *((32, 2, 64) if machine.rehearsal else (8192, 16, 128)))


def rotation(machine: Machine, rows: int, width: int) -> Measured:
    """Rows of bfloat16 -> rotated int8 rows and scales, and a copy of as many bytes."""
    form = gpu_hadamard.Hadamard("bf16", "i8", width, width, bits=8)
    kernel = gpu_hadamard.kernel(form)
    made = (emulated.build if machine.rehearsal else build)(kernel, machine.arch)
    device = machine.device
    sizes = {"x": 2 * rows * width, "y": rows * width, "scales": 4 * rows}
    places = {name: device.allocate(n) for name, n in sizes.items()}
    device.write(places["x"], np.random.default_rng(0).integers(0, 1 << 14, rows * width).astype(np.uint16))
    base = gpu_hadamard.base(width)
    if base is not None:
        array = base.numpy()
        places["base"] = device.allocate(array.nbytes)
        device.write(places["base"], array)
    numbers = {"x_row": width, "y_row": width, "blocks": rows, "rows": rows}
    values = [(places | numbers)[name] for name in kernel.types]
    function = _loaded(machine, made)
    grid = (-(-rows // form.blocks), 1)
    types = tuple(kernel.types.values())
    ours = _median(machine, lambda: device.launch(function, grid, made.warps, made.shared, types, values))
    copied = torch.empty(sum(sizes.values()) // 2, dtype=torch.uint8, device=machine.place)
    other = 1e3 * machine.median(lambda: torch.empty_like(copied).copy_(copied))
    for address in places.values():
        device.release(address)
    return Measured(f"rotate and round {rows} x {width}", ours, other, f"<= {RATIO_OF_COPY}x of a copy",
                    ours <= RATIO_OF_COPY * other)  # fmt: skip


def _loaded(machine: Machine, made: Any) -> Any:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.image)
        file.flush()
        return machine.device.function(Path(file.name), made.function, made.shared)


def _median(machine: Machine, launch: Callable[[], None]) -> float:
    launch()
    times = []
    for _ in range(RUNS if not machine.rehearsal else 2):
        first = machine.device.mark()
        launch()
        times.append(machine.device.elapsed(first, machine.device.mark()))
    return sorted(times)[len(times) // 2]


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention(machine: Machine, length: int, heads: int, width: int) -> Measured:
    """Causal int8 attention of float32 operands, and PyTorch's flash attention in bfloat16."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, width) for _ in range(3))
    passes = [sv.passes.QuantizeAttention(products="int8")]
    compiled = machine.compile(
        Attention(), example_inputs=(q, k, v), passes=passes, calibration=[(q, k, v)], dynamic={}
    )
    given = [x.to(machine.place) for x in (q, k, v)] if not machine.rehearsal else [x.numpy() for x in (q, k, v)]
    half = [x.to(machine.place, torch.bfloat16) for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    y = compiled(*given)
    error = _error(torch.as_tensor(y.cpu() if isinstance(y, Tensor) else y), exact)
    ours = 1e3 * machine.median(lambda: compiled(*given))
    other = 1e3 * machine.median(lambda: F.scaled_dot_product_attention(*half, is_causal=True))
    met = other >= RATIO_OF_ATTENTION * ours
    goal = f">= {RATIO_OF_ATTENTION}x of flash attention"
    return Measured(f"int8 attention {length}, error {error:.1e}", ours, other, goal, met)


def _error(found: Tensor, exact: Tensor) -> float:
    error = float((found - exact).abs().max() / exact.abs().max())
    if not error < WRONG:
        raise RuntimeError(f"int8 attention is off by {error} of the largest value")
    return error
