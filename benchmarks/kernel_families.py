"""CPU kernel families against torch, interleaved in one run: ratio of best times, GF/s and GB/s.

Run from the project root: python -m benchmarks.kernel_families [linear|matmul|attention|conv2d ...] [--threads N]
[--isa NAME]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sylvester.codegen.conv2d import Conv2d
from sylvester.codegen.isa import ISAS, Isa
from sylvester.codegen.panels import pack_f32 as pack
from tests import test_kernels_attention as attention
from tests import test_kernels_gemm as gemm
from tests.kernel_harness import bind, export, load, strides, supported, team

ROUNDS = 12
LINEAR = [(1, 192, 192), (1, 768, 768), (1, 2048, 2048), (1, 32000, 768), (4, 768, 3072), (8, 2048, 2048)]
LINEAR += [(32, 768, 768), (128, 192, 192), (128, 768, 768), (128, 2048, 768), (197, 192, 768)]
LINEAR += [(512, 768, 2048), (1024, 2048, 2048)]
MATMUL = [(12, 128, 128, 64, 1), (12, 128, 64, 128, 0), (1, 512, 512, 512, 0), (16, 197, 197, 64, 1)]
MATMUL += [(12, 1, 256, 64, 1)]
ATTENTION = [(1, 12, 12, 128, 128, 0), (1, 12, 12, 512, 512, 1), (1, 8, 2, 512, 512, 1), (8, 12, 12, 128, 128, 0)]
ATTENTION += [(1, 12, 12, 1, 256, 0), (1, 12, 12, 1, 2048, 0), (1, 32, 8, 1, 1024, 0), (1, 12, 12, 16, 256, 0)]
CONV2D = [
    (Conv2d(64, 64, (3, 3), padding=(1, 1)), 56),
    (Conv2d(256, 256, (3, 3), padding=(1, 1)), 14),
    (Conv2d(64, 256, (1, 1)), 56),
    (Conv2d(3, 64, (7, 7), stride=(2, 2), padding=(3, 3)), 224),
    (Conv2d(3, 192, (16, 16), stride=(16, 16)), 224),
    (Conv2d(144, 144, (3, 3), padding=(1, 1), groups=144), 56),
    (Conv2d(144, 144, (3, 3), stride=(2, 2), padding=(1, 1), groups=144), 56),
]


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[[], object]
    torch: Callable[[], object]
    flops: float
    bytes: float


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def linear(isa: Isa, threads: int) -> Iterator[Case]:
    lib = load(gemm.SOURCE, isa)
    with team(lib, threads) as made:
        for m, n, k in LINEAR:
            x, weight, bias, y = normal(m, k), normal(n, k), normal(n), normal(m, n)
            packed, tensors = pack(weight), [torch.from_numpy(a) for a in (x, weight, bias)]
            yield Case(
                f"linear m {m} n {n} k {k}",
                bind(lib, made, "plain", [m, n, k, k, n], [y, x, packed, bias]),
                lambda t=tensors: torch.nn.functional.linear(*t),
                2.0 * m * n * k,
                4.0 * (m * k + n * k + m * n),
            )


def matmul(isa: Isa, threads: int) -> Iterator[Case]:
    lib = load(gemm.SOURCE, isa)
    with team(lib, threads) as made:
        for batch, m, n, k, flip in MATMUL:
            a, b, y = normal(batch, m, k), normal(batch, n, k) if flip else normal(batch, k, n), normal(batch, m, n)
            b = b.swapaxes(1, 2) if flip else b
            tensors = [torch.from_numpy(array) for array in (a, b)]
            sizes = [batch, m, n, k, *strides(a, 3), *strides(b, 3)]
            yield Case(
                f"matmul {batch} x {m} {n} {k}{' b^T' if flip else ''}",
                bind(lib, made, "product", sizes, [y, a, b]),
                lambda t=tensors: torch.bmm(*t),
                2.0 * batch * m * n * k,
                4.0 * batch * (m * k + n * k + m * n),
            )


def sdpa(isa: Isa, threads: int) -> Iterator[Case]:
    lib = load(attention.SOURCE, isa)
    with team(lib, threads) as made:
        for batch, heads, kv_heads, rows, keys, causal in ATTENTION:
            q, y, k, v = (normal(batch, h, s, 64) for h, s in [(heads, rows)] * 2 + [(kv_heads, keys)] * 2)
            args = attention.pack_args(y, q, k, v, None, (batch, heads, kv_heads, rows, 0, keys, causal, 0, 0))
            block, tensors = np.frombuffer(args, np.uint8), [torch.from_numpy(array) for array in (q, k, v)]
            yield Case(
                f"attention {batch} x {heads}/{kv_heads} q {rows} k {keys}{' causal' if causal else ''}",
                bind(lib, made, "att_64_64_none", [], [block]),
                lambda t=tensors, c=bool(causal), g=heads != kv_heads: torch.nn.functional.scaled_dot_product_attention(
                    *t, is_causal=c, enable_gqa=g
                ),
                4.0 * batch * heads * rows * keys * 64 / (1 + causal),
                8.0 * batch * kv_heads * keys * 64,
            )


def conv2d(isa: Isa, threads: int) -> Iterator[Case]:
    from sylvester.codegen.conv2d import conv2d as text

    call = "(t, p[0], p[1], p[2], p[3], 1, i[0], i[0], i[1], i[1]);"
    names = [f"conv{n}" for n in range(len(CONV2D))]
    pairs = zip(names, CONV2D, strict=True)
    lib = load("".join(text(n, c) + export(n, f"{n}{call}", f"{n}_scratch") for n, (c, _) in pairs), isa)
    with team(lib, threads) as made:
        for name, (conv, side) in zip(names, CONV2D, strict=True):
            x, bias = normal(1, conv.channels, side, side), normal(conv.out_channels)
            weight = normal(conv.out_channels, conv.channels // conv.groups, *conv.kernel)
            tensors = [torch.from_numpy(a) for a in (x, weight, bias)]
            where = (conv.stride, conv.padding, conv.dilation, conv.groups)
            y = torch.nn.functional.conv2d(*tensors, *where).numpy()
            arrays = [y.copy(), x, weight, bias]
            yield Case(
                f"conv2d {conv.channels}->{conv.out_channels} k {conv.kernel[0]} s {conv.stride[0]} at {side}",
                bind(lib, made, name, [side, y.shape[-1]], arrays),
                lambda t=tensors, w=where: torch.nn.functional.conv2d(*t, *w),
                2.0 * y.size * weight[0].size,
                4.0 * (x.size + weight.size + y.size),
            )


def measure(case: Case) -> tuple[float, float]:
    """Best seconds of ours and torch over interleaved rounds."""
    best = [float("inf")] * 2
    case.ours()
    start = time.perf_counter()
    case.ours()
    repeat = max(1, int(3e-3 / (time.perf_counter() - start)))
    for _ in range(ROUNDS):
        for which, body in enumerate((case.ours, case.torch)):
            body()
            start = time.perf_counter()
            for _ in range(repeat):
                body()
            best[which] = min(best[which], (time.perf_counter() - start) / repeat)
    return best[0], best[1]


def main() -> None:
    families = {"linear": linear, "matmul": matmul, "attention": sdpa, "conv2d": conv2d}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(families)}; none: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=[isa.name for isa in ISAS], default=supported()[-1].name)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    isa = next(isa for isa in ISAS if isa.name == options.isa)
    with torch.inference_mode():
        for name in options.family or families:
            for case in families[name](isa, options.threads):
                ours, theirs = measure(case)
                rates = f"{case.flops / ours / 1e9:6.0f} GF/s {case.bytes / ours / 1e9:5.0f} GB/s"
                print(f"{case.name:40} {ours * 1e6:9.0f} us {rates}   {theirs / ours:5.2f}x torch", flush=True)


if __name__ == "__main__":
    main()
