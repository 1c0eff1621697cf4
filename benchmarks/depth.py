"""Leaving out layers and feed-forward parts on the shipped language model: decoding time, and quality for time saved.

    python -m benchmarks.depth --calibration FOLDER [--windows 6] [--runs 15] [--json FILE] [--svg FILE]

FOLDER has .txt files to calibrate on; the held-out text is examples/data. Quality is that of generation: half of every
window is read by `prefill`, the rest decoded. Times are medians of interleaved decoding steps at a context of 256.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sylvester as sv
from benchmarks.measure import settle, steady
from benchmarks.quality.recipes import HELD, WINDOW, load, windows
from benchmarks.suite.sylvester_engine import decode_step
from sylvester.backends.cpu_profile import profile
from sylvester.compiler import quality
from sylvester.compiler.layers import find_layers
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.svg_plot import Series, plot
from sylvester.passes import DepthSchedule, SkipFFN, SkipLayers

CONTEXT = 256
SPEEDUPS = (1.25, 1.5, 2.0)
TARGETS = (0.03, 0.06, 0.12, 0.19, 0.25, 0.31, 0.38, 0.5)
INCREASES = (0.01, 0.02, 0.05)
COLD = (2, 2)


@dataclass(frozen=True)
class Point:
    """One way to leave out work: what it costs in quality, and the milliseconds of a step that it saves."""

    kind: str
    passes: str
    skipped: float
    perplexity: float
    increase: float
    kl: float
    saved_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--times-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    program = load(1, argparse.Namespace(calibration=options.calibration, samples=8, windows=options.windows))
    timed: dict[str, list[dict[str, Any]]] = {}
    for name, model in {"random 110 M": large(), "shipped": program}.items():
        with sv.compile(model) as full:
            costs = part_times(full, len(find_layers(model)))
            print(f"{name}, a step: " + ", ".join(f"{part} {1e3 * t:.3f} ms" for part, t in costs.items()))
            timed[name] = list(times(model, full, costs, options.runs))
    points = [] if options.times_only else list(curves(program, costs))
    same_quality(points)
    if options.json:
        found = {"costs": costs, "times": timed, "points": [asdict(point) for point in points]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(drawing(points))


def large() -> Program:
    """A random Llama whose weights no cache holds, as those of larger models."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=512, use_cache=False, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return sv.trace(LlamaForCausalLM(config).eval(), (torch.zeros((2, 16), dtype=torch.long),))


def tokens(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return windows(HELD.read_text(encoding="utf-8"), 1)[0]["input_ids"][:, :count].numpy()


def part_times(full: sv.Compiled, layers: int) -> dict[str, float]:
    """Seconds of a decoding step by what spends them: one layer's attention, one layer's FFN, the rest."""
    runner, context = full._runner, {"input_ids": tokens(CONTEXT)}
    state = runner.new_state("start", context)
    runner.run("start", context, state)
    state.position = CONTEXT
    kernels = profile(runner, "decode", {"input_ids": tokens(1)}, state, 60)
    sums = {"attention": 0.0, "ffn": 0.0, "fixed": 0.0}
    for kernel in kernels:
        text = " ".join(kernel.kernel.labels)
        kind = "ffn" if ".mlp" in text else "attention" if ".self_attn" in text else "fixed"
        sums[kind] += kernel.seconds
    return sums | {kind: sums[kind] / layers for kind in ("attention", "ffn")}


def times(program: Program, full: sv.Compiled, costs: Mapping[str, float], runs: int) -> Iterator[dict[str, Any]]:
    """Decoding steps that leave work out beside those of all layers, and what the profile of these foretells."""
    layers = len(find_layers(program))
    whole = decode_step(full, tokens(CONTEXT + 1))
    total = costs["fixed"] + layers * (costs["attention"] + costs["ffn"])
    one_ffn = SkipFFN(threshold=-1.0, cold_start=COLD[0], cold_end=COLD[1], warmup=0)
    steps: list[tuple[Pass, float]] = [(one_ffn, (layers - sum(COLD) - 1) * costs["ffn"])]
    for speedup in SPEEDUPS:
        gone = layers - int(layers / speedup)
        steps.append((SkipLayers(speedup=speedup), gone * (costs["attention"] + costs["ffn"])))
    for step, saved in steps:
        with sv.compile(program, passes=(step,)) as compiled:
            seconds = medians([whole, decode_step(compiled, tokens(CONTEXT + 1))], runs)
            caches = len(compiled.manifest.state) // 2
        foretold = seconds[0] * (1 - saved / total)
        share = (seconds[0] - seconds[1]) / (seconds[0] - foretold)
        print(
            f"{step}: caches of {caches} layers, {1e3 * seconds[0]:.3f} -> {1e3 * seconds[1]:.3f} ms "
            f"({seconds[0] / seconds[1]:.2f}x), foretold {1e3 * foretold:.3f} ms (x{seconds[1] / foretold:.3f}), "
            f"{share:.0%} of the work left out is saved",
            flush=True,
        )
        yield {"step": str(step), "full": seconds[0], "skipped": seconds[1], "foretold": foretold, "share": share}


def medians(steps: Sequence[Callable[[], object]], runs: int) -> list[float]:
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(runs):
        for step, seconds in zip(steps, found, strict=True):
            settle()
            seconds += steady(step)
    return [statistics.median(seconds) for seconds in found]


def curves(program: Program, costs: Mapping[str, float]) -> Iterator[Point]:
    layers = len(find_layers(program))
    whole = costs["attention"] + costs["ffn"]
    for rule in ("uniform", "similarity"):
        for gone in range(1, layers // 2 + 1):
            step = SkipLayers(speedup=layers / (layers - gone), rule=rule)
            yield point(program, f"layers, {rule}", step, gone / layers, gone * whole)
    ways: dict[str, dict[str, Any]] = {"FFN, paper": {}, "FFN, single": {"max_run": 1}, "FFN, static": {"static": True}}
    for kind, options in ways.items():
        for target in [t for t in TARGETS if t <= 0.3 or not options]:
            step = SkipFFN(target=target, cold_start=COLD[0], cold_end=COLD[1], **options)
            share = max(1, round(target * layers)) / layers if step.static else target
            yield point(program, kind, step, share, share * layers * costs["ffn"])
    for least in (14, 12, 10, 8):
        schedule = DepthSchedule(min_layers=least, length=WINDOW)
        yield point(program, "depth schedule", schedule, (layers - least) / 2 / layers, (layers - least) / 2 * whole)


def point(program: Program, kind: str, step: Pass, skipped: float, saved: float) -> Point:
    changed = Pipeline((step,), check=False)(program)
    held = program.calibration.held if program.calibration else ()
    found = quality.compare(program, changed, held, prompt=WINDOW // 2)
    increase = found.perplexity / found.perplexity_before - 1
    cost = f"perplexity {increase:+.2%}, KL {found.kl:.4f}"
    print(f"{kind:20} {skipped:6.1%} skipped, {1e3 * saved:.3f} ms saved, {cost}", flush=True)
    return Point(kind, str(step), skipped, found.perplexity, increase, found.kl, 1e3 * saved)


def same_quality(points: Sequence[Point]) -> None:
    """What each way skips and saves where the perplexity has risen by so much, between the points measured."""
    for kind in dict.fromkeys(p.kind for p in points):
        line = [p for p in points if p.kind == kind]
        for increase in INCREASES:
            skipped, saved = (crossing(line, increase, field) for field in ("skipped", "saved_ms"))
            print(f"{kind:20} at {increase:.0%} more perplexity: {skipped:.1%} skipped, {saved:.3f} ms saved")


def crossing(line: Sequence[Point], increase: float, field: str) -> float:
    """Linear between (0, 0) and the points, up to the first that is above the increase."""
    before = (0.0, 0.0)
    for p in sorted(line, key=lambda p: p.skipped):
        here = (p.increase, float(getattr(p, field)))
        if here[0] >= increase:
            share = (increase - before[0]) / (here[0] - before[0])
            return before[1] + share * (here[1] - before[1])
        before = here
    return before[1]


def drawing(points: Sequence[Point]) -> str:
    kinds = dict.fromkeys(p.kind for p in points)
    shown = {kind: tuple((p.saved_ms, p.kl) for p in points if p.kind == kind and p.kl < 1) for kind in kinds}
    series = [Series(kind, places, joined=True) for kind, places in shown.items()]
    return plot(series, "ms saved of a decoding step", "KL nats")


if __name__ == "__main__":
    main()
