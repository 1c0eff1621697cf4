"""Our int4 graphs beside those of onnxruntime's own quantiser, on the shipped language model, all in onnxruntime.

    python -m benchmarks.onnx_int4 [--calibration FOLDER] [--context 256] [--runs 60] [--threads 1]

Both have int4 weights, head and table in symmetric groups of 32, which MatMulNBits and GatherBlockQuantized read, and
GroupQueryAttention over caches that are bound in place, the same ones for all. Size is of the weight matrices with
their scales; KL is from the float32 program, on held-out text. FOLDER has .txt files to fit to. Decode steps are timed
interleaved, in another order each round, after a pause that ends the spinning of the threads before.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sylvester as sv
from benchmarks.quality.candidates import Logits, Work, load
from benchmarks.quality.onnxruntime_candidates import logits as own_logits
from benchmarks.quality.onnxruntime_candidates import measured, quantize
from benchmarks.quality.sylvester_candidates import in_torch
from benchmarks.suite import onnx_llama
from benchmarks.suite.onnx_engine import session
from sylvester.backends.onnx.names import past_name, present_name
from sylvester.backends.onnx.runtime import open_session
from sylvester.compiler.program import Program
from sylvester.compiler.quality import kl_rows
from sylvester.passes import Quantize

OURS = {"clipped": Quantize(weights=4, group=32, method="mse"), "gptq": Quantize(weights=4, group=32, method="gptq")}
WARM = 20
PAUSE = 0.01
"""Seconds; threads of a session wait actively for less."""
PAST = "past_key_values."
"""What our names of past caches begin with."""
Array = NDArray[Any]
Caches = dict[str, Array]


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        work = load(options, Path(folder))
        caches = buffers(work.program)
        named = [name for name in OURS if name == "clipped" or work.fit]
        rows = [own(work, caches, options), *(ours(work, name, caches, options) for name in named)]
        steps = [step for _, _, _, step in rows]
        times = interleaved(steps, options.runs)
        print(f"{'int4 in onnxruntime':<28} {'bytes':>9} {'KL':>9} {'decode ms':>10} {'ratio':>6}")
        for (name, size, kl, _), taken in zip(rows, times, strict=True):
            ratio = statistics.median(a / b for a, b in zip(times[0], taken, strict=True))
            print(f"{name:<28} {size:9d} {kl:9.2e} {1e3 * statistics.median(taken):10.3f} {ratio:6.2f}")


Row = tuple[str, int, float, Callable[[], object]]


def own(work: Work, caches: Caches, options: argparse.Namespace) -> Row:
    """The float graph in the form of onnxruntime's model builder, through MatMulNBitsQuantizer."""
    plain, path = work.folder / "plain.onnx", work.folder / "own.onnx"
    onnx_llama.write(plain, work.checkpoint, "fp32", every=True)
    quantize(plain, path, 4, True, 4)
    step = decoding(session(path, options.threads), caches, "past.", lengths(options.context))
    return "its own quantiser", measured(path).total, divergence(work, own_logits(work, path)), step


def lengths(context: int) -> dict[str, Array]:
    return {
        "seqlens_k": np.array([context], np.int32),
        "total_sequence_length": np.array(context + 1, np.int32),
    }


def ours(work: Work, name: str, caches: Caches, options: argparse.Namespace) -> Row:
    program = work.program.clone()
    OURS[name].run(program)
    program.sweep()
    with sv.compile(program, target=sv.Target("onnx", options={"ops": "ort"})) as compiled:
        compiled.save(work.folder / name)
    artefact = sv.load(work.folder / name, threads=options.threads)

    def call(ids: Array) -> NDArray[np.float32]:
        return np.asarray(artefact(input_ids=ids[None])["logits"])[0]

    given = {"past": np.array(options.context, np.int64)}
    decode = open_session(work.folder / name / "decode.onnx", options.threads)
    step = decoding(decode, caches, PAST, given)
    return f"sylvester, {name}", matrices(program), divergence(work, call), step


def matrices(program: Program) -> int:
    """Bytes of whole numbers with their scales, in float32 as the graphs have them."""
    kinds = ("int4", "scales")
    return sum(t.numel() * t.element_size() for key, t in program.weights.items() if key.rpartition(".")[2] in kinds)


def buffers(program: Program) -> Caches:
    """Of one row, by slot: what each graph has as its past and its present, so that none is luckier in its memory."""
    random_numbers = np.random.default_rng(0)
    return {
        name: random_numbers.standard_normal((1, *(int(n) for n in slot.shape[1:])), np.float32)
        for name, slot in program.state.items()
    }


def decoding(current: Any, caches: Caches, prefix: str, given: dict[str, Array]) -> Callable[[], object]:
    """A step of one token, every buffer bound."""
    binding = current.io_binding()
    for spec in current.get_inputs():
        if not spec.name.startswith(prefix):
            binding.bind_cpu_input(spec.name, given.get(spec.name, np.full((1, 1), 7, np.int64)))
    for name, array in caches.items():
        for bind, kind in ((binding.bind_input, past_name), (binding.bind_output, present_name)):
            bind(kind(name).replace(PAST, prefix), "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("logits", "cpu")

    def step(_kept: Caches = caches) -> object:
        return current.run_with_iobinding(binding)

    return step


def divergence(work: Work, call: Logits) -> float:
    """Mean KL(float || int4) of the next token on the held-out windows."""
    exact, total, count = in_torch(work.program), 0.0, 0
    for ids in work.held:
        rows = kl_rows(torch.from_numpy(exact(ids))[:-1], torch.from_numpy(np.asarray(call(ids)))[:-1])
        total, count = total + float(rows.sum()), count + len(rows)
    return total / count


def interleaved(steps: list[Callable[[], object]], runs: int) -> list[list[float]]:
    """Seconds of each, in rounds of a few calls."""
    times: list[list[float]] = [[] for _ in steps]
    order = random.Random(0)
    for _ in range(WARM):
        for step in steps:
            step()
    for _ in range(runs):
        for step, found in order.sample(list(zip(steps, times, strict=True)), len(steps)):
            time.sleep(PAUSE)
            step()
            start = time.perf_counter()
            for _call in range(5):
                step()
            found.append((time.perf_counter() - start) / 5)
    return times


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="folder of .txt files to fit to; without it nothing is fitted")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--context", type=int, default=256, help="tokens in the caches")
    parser.add_argument("--runs", type=int, default=60, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
