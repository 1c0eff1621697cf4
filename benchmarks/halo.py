"""A training step of a small language model with HALO's products against autograd in bfloat16 and float32.

    python -m benchmarks.halo --batch 2 --length 512 --runs 9
    python -m benchmarks.halo --device cuda --width 4096 --batch 4 --length 2048        # beside torch.compile, fp8 too

All variants take a step in turns: forward, backward and AdamW. Ratios are of the medians, against bfloat16. Bytes are
those that are kept for backward, without weights and what is made of them: by linear layers but for the head, and in
all; --ops shows which op saves them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sylvester as sv
from benchmarks.halo_kept import LINEARS, by_op, kept

LEAST_HEADS, HEAD, WIDER = 8, 128, 4
"""Heads of narrow models, features of one in wide models, and how much wider the FFN is."""


class Block(nn.Module):
    """Pre-norm attention and FFN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(LEAST_HEADS, width // HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, WIDER * width), nn.Linear(WIDER * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Model(nn.Module):
    """A decoder without positions: nothing here is about what it learns."""

    def __init__(self, layers: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.embed, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Result:
    """Milliseconds of a step, and bytes kept for backward."""

    variant: str
    median: float
    best: float
    ratio: float
    linears: int
    everything: int
    ops: dict[str, int]


Step = Callable[[], None]


def loss(module: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(module(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def trainer(module: nn.Module, ids: Tensor) -> Step:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(module, ids).backward()
        optimizer.step()

    return step


def variants(options: argparse.Namespace, ids: Tensor) -> dict[str, nn.Module]:
    model = Model(options.layers, options.vocabulary, options.width).to(options.device)
    found: dict[str, nn.Module] = {"bf16": copy.deepcopy(model).bfloat16()}
    if not options.quick:
        found["fp32"] = copy.deepcopy(model)
    on_gpu = options.device != "cpu"
    if on_gpu:
        found["bf16 compiled"] = torch.compile(copy.deepcopy(model).bfloat16(), mode="max-autotune")
    for level, format in (*((n, "int8") for n in range(4)), *((n, "fp8") for n in ((0, 2) if on_gpu else ()))):
        found[f"{format} HALO-{level}"] = sv.halo(copy.deepcopy(model).bfloat16(), (ids,), level, format)
    for level in (2, 3):
        module = sv.halo(copy.deepcopy(model).bfloat16(), (ids,), level, saved="int8")
        found[f"int8 HALO-{level} saved int8"] = module
    if options.joint:
        found["int8 HALO-2 joint"] = sv.halo(copy.deepcopy(model).bfloat16(), (ids,), joint=True)
    return found


def keeps(module: nn.Module, ids: Tensor) -> tuple[int, int, dict[str, int]]:
    """Bytes of linear layers but for the head, in all, and by op as autograd would save them."""
    ops = by_op(module, lambda: loss(module, ids))
    return sum(ops.get(name, 0) for name in LINEARS), kept(module, lambda: loss(module, ids)), ops


def measure(options: argparse.Namespace) -> list[Result]:
    torch.manual_seed(0)
    ids = torch.randint(options.vocabulary, (options.batch, options.length), device=options.device)
    modules = variants(options, ids)
    memory = {name: keeps(module, ids) for name, module in modules.items()}
    steps = {name: trainer(module, ids) for name, module in modules.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if options.processor else time.perf_counter
    for run in range(options.runs + 1):
        for name, step in steps.items():
            wait(ids)
            start = clock()
            step()
            wait(ids)
            if run:
                times[name].append(1e3 * (clock() - start))
    base = statistics.median(times["bf16"])
    return [
        Result(name, statistics.median(t), min(t), statistics.median(t) / base, *memory[name])
        for name, t in times.items()
    ]


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def show(results: list[Result]) -> None:
    base = results[0]
    print(f"{'step':23} {'median':>10} {'best':>10} {'x bf16':>7} {'kept by linears':>20} {'in all':>16}")
    for r in results:
        linears, everything = (
            f"{n / 1e6:.1f} MB {n / m:.2f}x" for n, m in ((r.linears, base.linears), (r.everything, base.everything))
        )
        print(f"{r.variant:23} {r.median:7.1f} ms {r.best:7.1f} ms {r.ratio:6.2f}x {linears:>20} {everything:>16}")


def show_ops(results: list[Result]) -> None:
    """What autograd saves without hooks, by op, of the variants that have none."""
    for r in results:
        if "saved" not in r.variant:
            ops = sorted(r.ops.items(), key=lambda item: -item[1])
            print(f"{r.variant}: " + ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in ops))


def show_profile(options: argparse.Namespace) -> None:
    """Where a step of bf16 and one of HALO-2 spend their time."""
    torch.manual_seed(0)
    ids = torch.randint(options.vocabulary, (options.batch, options.length), device=options.device)
    for name, module in variants(options, ids).items():
        if name in ("bf16", "int8 HALO-2"):
            step = trainer(module, ids)
            step()
            with profile(activities=[ProfilerActivity.CPU]) as found:
                step()
            print(name)
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 4),
        ("vocabulary", 1024),
        ("batch", 2),
        ("length", 512),
        ("runs", 9),
        ("threads", 0),
        ("width", 768),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--processor", action="store_true", help="time of the processor: with --threads 1 on a busy machine"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--joint", action="store_true", help="the joint graph as well")
    parser.add_argument("--quick", action="store_true", help="without float32")
    parser.add_argument("--ops", action="store_true", help="bytes by the op that saves them as well")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of ratios")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.profile:
        show_profile(options)
        return
    results = measure(options)
    show(results)
    if options.ops:
        show_ops(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
