"""Held-out perplexity of the shipped language model with part of its attention weights shared, bytes and decode time.

    python -m benchmarks.sharing --calibration FOLDER [--remove 0.1 0.2 0.3] [--windows 8] [--json out/sharing.json]

FOLDER has .txt files to fit to; the held-out text is examples/data. All methods see the same calibration windows:
MASA (atoms of all blocks), MASA with low rank, singular values per layer with equal ranks and with ranks by gain, and
Basis Sharing. Then the drift over the number of atoms, stored bytes beside the formula, and decode time by mode.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

import sylvester as sv
from benchmarks.quality.recipes import CHARACTERS, HELD, MODEL, windows
from sylvester.backends.tensor_file import map_tensors
from sylvester.compiler import quality
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.passes import ShareAttention, ShareBasis
from sylvester.passes.atom_plan import Planner
from sylvester.passes.atoms import allocate, low_rank
from sylvester.passes.shared_layers import ATTENTION, find_series, total_parameters

POSITION, TOKENS, ROUNDS = 128, 32, 12
"""Tokens before the timed steps, steps of a timed round, and rounds."""


@dataclass(frozen=True)
class Row:
    """One method on the model, beside the model as it is."""

    method: str
    asked: float
    removed: float
    perplexity: float
    ratio: float
    kl: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.method:<30} {self.asked:6.0%} {self.removed:8.1%} {self.perplexity:8.3f} {self.ratio:8.4f} "
            f"{self.kl:8.4f} {self.agreement:7.1%}"
        )


HEADING = f"{'method':<30} {'asked':>6} {'removed':>8} {'ppl':>8} {'of dense':>8} {'KL':>8} {'top-1':>7}"


class Bench:
    """The model with its data; every row compares a changed program with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.program = sv.trace(str(MODEL))
        texts = [path.read_text(encoding="utf-8") for path in sorted(options.calibration.glob("*.txt"))]
        fit = windows("\n".join(text[:CHARACTERS] for text in texts), options.samples)
        self.program.calibration = Calibration(fit, windows(HELD.read_text(encoding="utf-8"), options.windows))
        self.series = find_series(self.program, ATTENTION, Changes())
        self.blocks = len(self.series[0].layers)
        self.total = total_parameters(self.series)
        self.planner = Planner(self.program, self.series, Changes())

    def applied(self, step: Pass) -> Program:
        return Pipeline((step,), check=False)(self.program)

    def row(self, method: str, asked: float, changed: Program, removed: float | None = None) -> Row:
        assert self.program.calibration is not None
        found = quality.compare(self.program, changed, self.program.calibration.held)
        fewer = (self.program.weights.nbytes - changed.weights.nbytes) / 4 / self.total if removed is None else removed
        ratio = found.perplexity / found.perplexity_before
        return Row(method, asked, fewer, found.perplexity, ratio, found.kl, found.agreement)

    def methods(self, remove: float) -> Iterator[Row]:
        """Every method at one budget; atoms alone remove as little as is at least asked for."""
        atoms = int((1 - remove) * self.blocks)
        alone = ShareAttention(atoms=atoms, group_size=self.blocks)
        yield self.row(f"MASA, {atoms} atoms of {self.blocks}", remove, self.applied(alone))
        yield self.row("MASA + refinement", remove, self.applied(ShareAttention(remove=remove)))
        yield self.row("SVD per layer, equal ranks", remove, self.applied(self._basis(remove, 1)))
        yield self.ranked(remove)
        yield self.row("Basis Sharing, 2 blocks", remove, self.applied(self._basis(remove, 2)))
        yield self.row("Basis Sharing, 4 blocks", remove, self.applied(self._basis(remove, 4)))

    def _basis(self, remove: float, group: int) -> ShareBasis:
        return ShareBasis(ratio=remove, group=group, kinds=ATTENTION, private=() if group == 1 else ("o",))

    def ranked(self, remove: float) -> Row:
        """Per layer, with the weights and whitening of the atoms and ranks by the same rule, but no atoms."""
        planner, changed = self.planner, self.program.clone()
        members = [m for c in planner.clusters(planner.groups(self.blocks)) for m in c.members]
        whitened = [m.whitening.apply(self.program.weights[m.layer.key].double()) for m in members]
        gains = [m.weight * torch.linalg.svdvals(w).square() for m, w in zip(members, whitened, strict=True)]
        ranks = allocate(gains, [sum(m.layer.shape) for m in members], round((1 - remove) * self.total))
        for member, rank in zip(members, ranks, strict=True):
            left, right = low_rank(self.program.weights[member.layer.key].double(), member.whitening, rank)
            changed.weights[member.layer.key] = (left @ right).float()
        kept = sum(rank * sum(m.layer.shape) for m, rank in zip(members, ranks, strict=True))
        return self.row("SVD per layer, ranks by gain", remove, changed, 1 - kept / self.total)

    def curve(self) -> Iterator[Row]:
        """Atoms of all blocks without low rank, from one to as many as there are blocks."""
        for atoms in sorted({1, *range(2, self.blocks + 1, 2), self.blocks}):
            step = ShareAttention(atoms=atoms, group_size=self.blocks)
            yield self.row(f"{atoms} atoms of {self.blocks}", 1 - atoms / self.blocks, self.applied(step))

    def stored(self, remove: float) -> dict[str, float]:
        """Bytes of the artefacts' weights by mode, beside what the formula says."""
        atoms, group, rank = 2, 4, 8
        found: dict[str, float] = {"dense": self._file(self.program)}
        shapes = [s.layers[0].shape for s in self.series]
        groups = len(self.planner.groups(group))
        atoms_held = sum(groups * atoms * n * k + self.blocks * atoms for n, k in shapes)
        thin = sum(rank * self.blocks * (n + k) for n, k in shapes)
        found["formula"] = found["dense"] - 4 * (self.total - atoms_held - thin)
        for mode in ("load", "run"):
            step = ShareAttention(atoms=atoms, group_size=group, refine_rank=rank, mode=mode)  # type: ignore[arg-type]
            found[mode] = self._file(self.applied(step))
        return found

    def _file(self, program: Program) -> float:
        with tempfile.TemporaryDirectory() as folder:
            sv.compile(program).save(Path(folder, "a"))
            return float(sum(array.nbytes for array in map_tensors(Path(folder, "a", "weights.safetensors")).values()))

    def decode_times(self, remove: float) -> dict[str, float]:
        """Median milliseconds of a token, the modes taking turns."""
        options: dict[str, Any] = {"atoms": 2, "group_size": 4, "refine_rank": 8}
        programs = {"dense": self.program}
        programs |= {mode: self.applied(ShareAttention(**options, mode=mode)) for mode in ("load", "run")}
        programs["Basis Sharing"] = self.applied(self._basis(remove, 2))
        steps = {name: decoding(program) for name, program in programs.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                times[name].append(step())
        return {name: median(found) for name, found in times.items()}


def decoding(program: Program) -> Callable[[], float]:
    """A function that decodes some tokens after others and returns the milliseconds of one."""
    runner = sv.compile(program)._runner
    state = runner.new_state("decode", {"input_ids": np.zeros((1, 1), np.int64)})

    def step() -> float:
        start = perf_counter()
        for n in range(TOKENS):
            state.position = POSITION + n
            runner.run("decode", {"input_ids": np.full((1, 1), 5 + n, np.int64)}, state)
        return 1e3 * (perf_counter() - start) / TOKENS

    step()
    return step


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of .txt files to fit to")
    parser.add_argument(
        "--remove", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="parts of attention"
    )
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


PARTS = ("methods", "curve", "bytes", "time")


def measured(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, object]]:
    """Name of a part and what was found, as it is found."""
    if "methods" in options.only:
        print(HEADING, flush=True)
        yield from (("methods", row) for remove in options.remove for row in bench.methods(remove))
    if "curve" in options.only:
        print(HEADING, flush=True)
        yield from (("curve", row) for row in bench.curve())
    if "bytes" in options.only:
        yield "bytes", bench.stored(options.remove[0])
    if "time" in options.only:
        yield "time", bench.decode_times(options.remove[0])


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    bench, found = Bench(options), dict[str, list[object]]()
    for part, result in measured(bench, options):
        print(f"{part}: {result}" if isinstance(result, dict) else result, flush=True)
        found.setdefault(part, []).append(asdict(result) if isinstance(result, Row) else result)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
