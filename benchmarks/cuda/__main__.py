"""Whole models and single kernels on the GPU of this machine: built, checked, tuned and timed beside PyTorch.

    python -m benchmarks.cuda [--works L-decode S] [--tune 60] [--runs 20] [--models out/models] [--json out.json]
    python -m benchmarks.cuda --rehearse        # the same steps on the CPU by an emulated device: times mean nothing

Every engine chooses the next token, and is told how many of them are those of float32. Rows of one work are timed in
turns; medians. `--tune` seconds a model go into choosing tiles, which later runs and builds take from the database.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.cuda import kernels
from benchmarks.cuda.engines import FROM, RECIPES, Step, our_step, ours, torch_step, torchao
from benchmarks.cuda.machine import Machine, found
from benchmarks.cuda.works import BANDWIDTH_GOAL, WORKS, Sizes, Work
from benchmarks.measure import seconds
from benchmarks.suite import sizes as shapes
from benchmarks.suite.shapes import Checkpoint, token_ids, write_checkpoint

REHEARSED = {
    "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "vocab_size": 100, "rope_theta": 1e4, "max_position_embeddings": 64,
}  # fmt: skip
PYTORCH = ("torch", "torch.compile")
PEAKS = ("bf16", "int8", "fp8")


@dataclass(frozen=True)
class Row:
    """Milliseconds of a step, `agrees`: the part of rows whose token is that of float32; or why there is no time."""

    work: str
    engine: str
    precision: str
    median: float = 0.0
    agrees: float = 0.0
    failure: str = ""


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    options = parsed(arguments)
    machine = found(options.rehearse)
    sizes = Sizes(6, 5, 16) if options.rehearse else Sizes()
    works = [w for w in WORKS if not options.works or any(w.name.startswith(name) for name in options.works)]
    if not works:
        raise SystemExit(f"no work begins with one of {options.works}, expected of {[w.name for w in WORKS]}")
    if options.rehearse:
        shapes.LLAMAS |= {"L": REHEARSED, "S": REHEARSED}
    else:
        for settings in shapes.LLAMAS.values():
            settings["max_position_embeddings"] = sizes.capacity
    print(
        f"{machine.name}, {machine.device.arch}, torch {torch.__version__}, {platform.machine()}, {time.strftime('%F')}"
    )
    peaks = [kind for kind in PEAKS if machine.arch >= FROM.get(kind, "")]
    limits = {kind: machine.peak(kind) for kind in peaks} | {"copy": machine.bandwidth()}
    told = (f"copy {limits['copy'] / 1e9:.0f} GB/s", *(f"{k} {limits[k] / 1e12:.1f} T/s" for k in peaks))
    print(", ".join(told))
    rows: list[Row] = []
    try:
        for work in works:
            rows += measured(machine, work, sizes, options)
            report([row for row in rows if row.work == work.name], work, sizes, limits)
        for one in kernels.all_of(machine):
            print(f"{one.name}: {one.ours:.3f} ms, {one.other:.3f} ms: {one.goal} {'met' if one.met else 'missed'}")
    finally:
        machine.close()
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=[], help="beginnings of names, such as L-decode-16")
    parser.add_argument("--tune", type=float, help="seconds for the tiles of a model")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--models", type=Path, default=Path("out/models"), help="where random weights are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, nothing is timed in earnest")
    return parser.parse_args(arguments)


def measured(machine: Machine, work: Work, sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """Every engine that can be built; float32 of eager PyTorch says which tokens are right."""
    checkpoint = kept(work.shape, options.models / f"{sizes.capacity}-positions")
    ids = token_ids(work.shape, work.batch, max(sizes.prompt, sizes.context + 1))
    model = checkpoint.load(torch.float32).to(machine.place)
    exact = torch_step(machine, model, work, ids, sizes, False)()
    del model
    steps: dict[tuple[str, str], Step] = {}
    rows = []
    for engine, precision in _engines(machine, work):
        try:
            steps[engine, precision] = _step(machine, work, ids, sizes, options, checkpoint, engine, precision)
            steps[engine, precision]()
        except Exception as error:  # a peer that is missing or fails is a row that says so
            steps.pop((engine, precision), None)
            rows.append(
                Row(work.name, engine, precision, failure=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            )
    agrees = {key: float(np.mean(step() == exact)) for key, step in steps.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(options.runs if not machine.rehearsal else 1):
        for key, step in steps.items():
            machine.wait()
            times[key].append(seconds(step))
    return [Row(work.name, *key, 1e3 * statistics.median(t), agrees[key]) for key, t in times.items()] + rows


def kept(shape: str, models: Path) -> Checkpoint:
    """Random weights of a shape, written once."""
    folder = models / f"{shape}-checkpoint"
    if not folder.exists():
        making = folder.with_name(f".making-{folder.name}")
        shutil.rmtree(making, ignore_errors=True)
        write_checkpoint(making, shape)
        making.rename(folder)
    return Checkpoint(shape, models)


def _engines(machine: Machine, work: Work) -> Iterator[tuple[str, str]]:
    """float8 is for prompts: one token reads as many bytes in int8."""
    kept = (p for p in RECIPES if machine.arch >= FROM.get(p, "") and (p != "fp8" or work.kind == "prefill"))
    yield from (("sylvester", precision) for precision in kept)
    yield from ((engine, "bf16") for engine in (PYTORCH if not machine.rehearsal else PYTORCH[:1]))
    if not machine.rehearsal:
        yield from (("torchao", precision) for precision in ("int8", "int4"))


def _step(
    machine: Machine, work: Work, ids: torch.Tensor, sizes: Sizes, options: argparse.Namespace, checkpoint: Checkpoint,
    engine: str, precision: str,
) -> Step:  # fmt: skip
    if engine == "sylvester":
        return our_step(ours(machine, checkpoint.folder, precision, sizes, options.tune), work, ids, sizes)
    model = checkpoint.load(torch.bfloat16).to(machine.place)
    if engine == "torchao":
        model = torchao(model, precision, work.kind)
    return torch_step(machine, model, work, ids, sizes, compiled=engine != "torch")


def report(rows: Sequence[Row], work: Work, sizes: Sizes, limits: dict[str, float]) -> None:
    """Times as fast as the best of PyTorch in bfloat16, and what part of the bound is reached."""
    best = min((row.median for row in rows if row.engine in PYTORCH and not row.failure), default=float("nan"))
    for row in rows:
        if row.failure:
            print(f"{work.name:16} {row.engine:14} {row.precision:5} {row.failure}")
            continue
        rate = limits[row.precision if row.precision in limits else "int8"]
        bound = 1e3 * max(work.operations(sizes) / rate, work.bytes_read(row.precision, sizes) / limits["copy"])
        name = f"{work.name:16} {row.engine:14} {row.precision:5} {row.median:9.3f} ms"
        part = f"{best / row.median:5.2f}x of bf16, {bound / row.median:4.0%} of the bound"
        print(f"{name}  {part}, {row.agrees:4.0%} as in float32{goal(row, work, best, bound)}")


def goal(row: Row, work: Work, best: float, bound: float) -> str:
    """The goals of this compiler's rows, met or missed."""
    if row.engine != "sylvester":
        return ""
    found = []
    if row.precision in work.goals:
        found.append((f"{work.goals[row.precision]}x", best / row.median >= work.goals[row.precision]))
    if work.kind == "decode":
        found.append((f"{BANDWIDTH_GOAL:.0%}", bound / row.median >= BANDWIDTH_GOAL))
    return "".join(f"; goal {name} {'met' if met else 'missed'}" for name, met in found)


if __name__ == "__main__":
    main()
