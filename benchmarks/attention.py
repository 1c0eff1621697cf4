"""Causal attention beside PyTorch's scaled_dot_product_attention, interleaved in one run, and the errors of both.

    python -m benchmarks.attention [--threads 2] [--runs 7] [--lengths 512 2048 8192] [--json FILE]

8 query heads over 2 key heads, features of 64 and 128. "float32" is the exact kernel, "bfloat16" the pass
quantize-attention beside PyTorch in bfloat16, "int8" that pass with products="int8" beside PyTorch in float32. Errors
are relative (Euclidean), against float64.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

# Threads of PyTorch that spin after a call would take a core from ours while it is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylvester as sv

HEADS, KEY_HEADS = 8, 2
PASSES: dict[str, Sequence[sv.passes.QuantizeAttention]] = {
    "float32": (),
    "bfloat16": (sv.passes.QuantizeAttention(),),
    "int8": (sv.passes.QuantizeAttention(products="int8"),),
}


class Attend(nn.Module):
    """Causal, query heads in groups over key heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@dataclass(frozen=True)
class Row:
    """Milliseconds, and relative errors against float64."""

    arithmetic: str
    features: int
    length: int
    ours_ms: float
    torch_ms: float
    ours_error: float
    torch_error: float

    def __str__(self) -> str:
        return (
            f"{self.arithmetic:9} {self.features:4} features {self.length:5} tokens  {self.ours_ms:9.3f} ms  "
            f"torch {self.torch_ms:9.3f} ms ({self.torch_ms / self.ours_ms:4.2f}x)  "
            f"errors {self.ours_error:.1e}, torch {self.torch_error:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for row in measured(options):
        rows.append(row)
        print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def measured(options: argparse.Namespace) -> Iterator[Row]:
    for features in (64, 128):
        examples = operands(features, 16)
        tokens = {2: torch.export.Dim("tokens", min=2, max=1 << 16)}
        models = {
            name: sv.compile(Attend(), examples, passes=passes, threads=options.threads, dynamic=(tokens,) * 3)
            for name, passes in PASSES.items()
        }
        for length in options.lengths:
            given = operands(features, length)
            exact = Attend()(*(t.double() for t in given))
            for name, model in models.items():
                theirs = [t.bfloat16() for t in given] if name == "bfloat16" else given
                calls = (lambda m=model, g=given: m(*g), lambda t=theirs: Attend()(*t))
                ours_ms, torch_ms = race(calls, options.runs)
                errors = [float((call().double() - exact).norm() / exact.norm()) for call in calls]
                yield Row(name, features, length, ours_ms, torch_ms, *errors)


def operands(features: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, features) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
    return q, k, v


def race(calls: Sequence[Callable[[], Tensor]], runs: int) -> list[float]:
    """Medians in milliseconds of calls that take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if run:
                found.append(1e3 * (time.perf_counter() - start))
    return [median(found) for found in times]


if __name__ == "__main__":
    main()
