"""Feed-forward parts that skip weights beside dense ones, interleaved in one run; and what the zeros cost in quality.

python -m benchmarks.sparsity [--threads N]                      time of stacks of parts, at one row and at 128
python -m benchmarks.sparsity --quality --calibration FOLDER     the shipped language model: perplexity and tokens/s
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylvester as sv
from sylvester.backends.limits import measure
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.quality import compare
from sylvester.compiler.samples import parse, read
from sylvester.passes.sparsify_activations import SparsifyActivations

ROOT = Path(__file__).parents[1]
MODEL, HELD_OUT = ROOT / "examples/models/novels-7m", ROOT / "examples/data/wuthering-heights.txt"
SHAPES = {"shipped LM": (192, 512, 16), "1024 x 2816": (1024, 2816, 2)}
"""Width, hidden features, and how many such parts follow each other, so that weights come from where they do in use."""
SPARSITIES, LEVELS = (0.5, 0.7), (0.25, 0.5, 0.7)
PROMPT, ROUNDS, WARM = 128, 15, 0.2
BOUND = "one row at 50 % may take at most 0.833 of the dense time"


class Gated(nn.Module):
    """x + W_down (silu(W_gate n(x)) * W_up n(x)), several times."""

    def __init__(self, width: int, hidden: int, parts: int) -> None:
        super().__init__()
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(*s, bias=False) for s in sizes) for _ in range(parts))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        for norm, (gate, up, down) in zip(self.norms, self.layers, strict=True):
            n = norm(x)
            x = x + down(F.silu(2 * gate(n)) * up(n))
        return x


def stack(width: int, hidden: int, parts: int) -> Program:
    """Entries `forward` for prompts and `decode` for one row, over the same weights."""
    torch.manual_seed(0)
    program = sv.trace(Gated(width, hidden, parts).eval(), (torch.randn(2, width),))
    program.entries["decode"] = program.main.clone()
    name = next(iter(program.main.examples))
    program.calibration = Calibration(tuple({name: torch.randn(64, width)} for _ in range(2)))
    return program


def runner(compiled: Compiled, entry: str, inputs: Sequence[np.ndarray]) -> Callable[[], object]:
    """The next of some inputs on each call, so that other weights are skipped."""
    name = compiled.manifest.entries[entry].inputs[0].name
    turn = iter(range(1 << 62))
    return lambda: compiled._runner.run(entry, {name: inputs[next(turn) % len(inputs)]})


def race(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds by name: the median over rounds of the best of several calls, which other programs did not interrupt.

    Each runs for a while before it is timed, as threads and caches settle.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            until = time.perf_counter() + WARM / 4
            while time.perf_counter() < until:
                call()
            times[name].append(min(_seconds(call) for _ in range(12)))
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed(threads: int) -> None:
    limits = measure(threads)
    print(f"{threads} thread(s); {BOUND}")
    for title, (width, hidden, parts) in SHAPES.items():
        dense = stack(width, hidden, parts)
        programs = {"dense": dense}
        programs |= {f"{s:.0%}": Pipeline((SparsifyActivations(s),), check=False)(dense) for s in SPARSITIES}
        engines = {name: sv.compile(program, threads=threads) for name, program in programs.items()}
        for rows, entry in ((1, "decode"), (16, "forward"), (48, "forward"), (PROMPT, "forward")):
            inputs = [np.random.default_rng(n).standard_normal((rows, width), np.float32) for n in range(16)]
            times = race({name: runner(engine, entry, inputs) for name, engine in engines.items()})
            for name, seconds in times.items():
                share = 1 - (float(name.rstrip("%")) / 100 if name != "dense" and rows == 1 else 0)
                moved = 4.0 * width * hidden * parts * (1 + 2 * share)
                limit = moved / limits.bandwidth(4.0 * width * hidden * parts * 3, threads)
                rate = f"{moved / seconds / 1e9:5.1f} GB/s, {limit / seconds:4.0%} of the limit" if rows == 1 else ""
                print(f"{title:12} {rows:4} rows {name:>6} {1e6 * seconds / parts:8.1f} us a part", end="  ")
                print(f"{seconds / times['dense']:5.3f} of dense  {rate}", flush=True)
        for engine in engines.values():
            engine.close()


def windows(program: Program, text: str, count: int) -> list[dict[str, Tensor]]:
    return list(read(program, [text[: 60_000 * count // 30]]))[:count]


def calibrated(program: Program, folder: Path, count: int = 24) -> Program:
    """The model with windows of every text of a folder to fit to."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    each = 60_000 // len(texts) * count // 24
    program.calibration = parse(program, [text[len(text) // 3 :][:each] for text in texts])
    return program


def variants() -> Iterator[tuple[str, SparsifyActivations]]:
    for level in LEVELS:
        for kind in ("channel", "layer"):
            yield f"{level:.0%} by {kind}", SparsifyActivations(level, phase="all", thresholds=kind)  # type: ignore[arg-type]
    for level in LEVELS:
        yield f"{level:.0%} by channel, and attention", SparsifyActivations(level, attention=True, phase="all")


def quality(folder: Path, threads: int) -> None:
    program = calibrated(sv.trace(MODEL), folder)
    held = windows(program, HELD_OUT.read_text(encoding="utf-8"), 30)
    print(f"{MODEL.name}, {len(held)} windows of {HELD_OUT.name}, fitted to {len(program.calibration.fit)} others")  # type: ignore[union-attr]
    for name, step in variants():
        found = compare(program, Pipeline((step,), check=False)(program), held)
        print(f"{name:32} {found}", flush=True)
    engines = {"dense": sv.compile(program, threads=threads)}
    for name, step in (("50%", SparsifyActivations()), ("50% with attention", SparsifyActivations(attention=True))):
        engines[name] = sv.compile(Pipeline((step,), check=False)(program), threads=threads)
    prompt = next(iter(held[0].values()))[:1, :32].numpy()
    times = race({name: lambda e=engine: e.generate(prompt, 48, reuse=False) for name, engine in engines.items()})  # type: ignore[misc]
    for name, seconds in times.items():
        print(f"{name:20} {48 / seconds:7.0f} tokens/s  {times['dense'] / seconds:5.3f}x dense, prompt of 32 included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--calibration", type=Path, help="a folder of texts to fit thresholds to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quality and options.calibration is None:
        parser.error("--quality needs --calibration FOLDER")
    with torch.inference_mode():
        quality(options.calibration, options.threads) if options.quality else speed(options.threads)


if __name__ == "__main__":
    main()
