"""Held-out perplexity of the shipped language model: bits x rotations, plain and with injected outliers.

    python -m benchmarks.quality.recipes --calibration FOLDER [--windows 8] [--seeds 3] [--json out/recipes.json]

FOLDER has .txt files to fit to; the held-out text is examples/data. Rows with rotations are means over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import sylvester as sv
from benchmarks.quality.injection import inject
from sylvester.compiler import quality
from sylvester.compiler.calibration import Calibration, Sample
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.passes import Equalize, Quantize, RotateHadamard, SplitLinears

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/models/novels-7m"
HELD = ROOT / "examples/data/wuthering-heights.txt"
WINDOW = 512
CHARACTERS = 100_000
"""Of each calibration file."""
BITS: dict[str, Quantize] = {
    "BF16": Quantize(weights=16),
    "FP16": Quantize(weights="fp16"),
    "FP8": Quantize(weights="fp8"),
    "W8A8": Quantize(weights=8),
    "W4A8": Quantize(weights=4),
    "W4A8 gptq": Quantize(weights=4, method="gptq"),
    "W4A16 gptq": Quantize(weights=4, activations=None, method="gptq"),
    "W3A16 gptq": Quantize(weights=3, activations=None, method="gptq"),
    "W4A4": Quantize(weights=4, activations=4),
    "W4A4 gptq": Quantize(weights=4, activations=4, method="gptq"),
    "W4A4 gptq, head a8": Quantize(weights=4, activations=4, method="gptq", per_layer={"*embed*": "w4a8"}),
    "W8A8KV4": Quantize(weights=8, kv=4),
    "KV4": Quantize(weights=16, activations=None, kv=4),
}
SCALED: tuple[Pass, ...] = (SplitLinears(), Equalize())
SEEDED = ("all rotations", "equalize + all", "all + heads", "R1", "R1 + R2")


@dataclass(frozen=True)
class Row:
    """One list of passes on one model, against the float program."""

    outliers: float
    bits: str
    rotations: str
    perplexity: float
    ratio: float
    kl: float
    agreement: float
    seeds: int

    def __str__(self) -> str:
        return (
            f"x{self.outliers:<4g} {self.bits:<18} {self.rotations:<16} {self.perplexity:9.2f} {self.ratio:8.3f} "
            f"{self.kl:9.4f} {self.agreement:7.1%} {self.seeds:5d}"
        )


HEADING = f"{'out':<5} {'bits':<18} {'rotations':<16} {'ppl':>9} {'of fp32':>8} {'KL':>9} {'top-1':>7} {'seeds':>5}"


def rotations(seed: int, keys: bool) -> dict[str, tuple[Pass, ...]]:
    """What is done before the rounding, by name."""
    everything = RotateHadamard(seed=seed, keys=keys)
    return {
        "plain": (),
        "R1": (RotateHadamard(values=False, ffn=False, seed=seed),),
        "R1 + R2": (RotateHadamard(ffn=False, seed=seed),),
        "all rotations": (everything,),
        "all + heads": (RotateHadamard(heads=True, seed=seed, keys=keys),),
        "equalize": SCALED,
        "equalize + all": (*SCALED, everything),
    }


def rows(options: argparse.Namespace) -> Iterator[Row]:
    for factor in options.outliers:
        program = load(factor, options)
        for bits in options.bits:
            for name in options.rotations:
                seeds = range(options.seeds if name in SEEDED else 1)
                found = [measure(program, bits, rotations(seed, "KV4" in bits)[name]) for seed in seeds]
                yield Row(
                    factor,
                    bits,
                    name,
                    mean(q.perplexity for q in found),
                    mean(q.perplexity / q.perplexity_before for q in found),
                    mean(q.kl for q in found),
                    mean(q.agreement for q in found),
                    len(found),
                )


def measure(program: Program, bits: str, before: tuple[Pass, ...]) -> quality.Quality:
    changed = Pipeline((*before, BITS[bits]), check=False)(program)
    assert program.calibration is not None
    return quality.compare(program, changed, program.calibration.held)


def load(factor: float, options: argparse.Namespace) -> Program:
    """The shipped model with outliers of the given factor (1: none), with calibration and held-out windows."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if factor != 1:
        inject(model, factor)
    program = sv.trace(model, (torch.zeros((2, WINDOW), dtype=torch.long),))
    fit = "\n".join(path.read_text(encoding="utf-8")[:CHARACTERS] for path in sorted(options.calibration.glob("*.txt")))
    held = HELD.read_text(encoding="utf-8")
    program.calibration = Calibration(windows(fit, options.samples), windows(held, options.windows))
    return program


def windows(text: str, count: int) -> tuple[Sample, ...]:
    """Windows that are spread evenly over the text and do not overlap."""
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    step = len(ids) // count
    if step < WINDOW:
        raise SystemExit(f"the text has {len(ids)} tokens, expected at least {count * WINDOW}")
    return tuple({"input_ids": torch.tensor([ids[i * step : i * step + WINDOW]])} for i in range(count))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of .txt files to fit to")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outliers", type=float, nargs="+", default=[1, 30], help="factors; 1 leaves the model alone")
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--rotations", nargs="+", default=list(rotations(0, False)), choices=list(rotations(0, False)))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    found = []
    print(HEADING, flush=True)
    for row in rows(options):
        found.append(asdict(row))
        print(row, flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
