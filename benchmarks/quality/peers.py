"""Quality at equal size on the shipped language model: our recipes beside llama.cpp, onnxruntime and OpenVINO.

    python -m benchmarks.quality.peers --calibration FOLDER [--windows 16] [--engines sylvester llama.cpp ...]
        [--json out/quality.json]

KL(float || low-bit), top-1 agreement and perplexity on held-out text; the float model is the float32 program in
PyTorch, ours are compiled artefacts. FOLDER has .txt files to fit to. Caches are float32 everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.quality.candidates import Candidate, Work, load
from benchmarks.quality.sylvester_candidates import in_torch
from sylvester.compiler.quality import kl_rows

ENGINES = {
    "sylvester": "sylvester_candidates",
    "llama.cpp": "llama_cpp_candidates",
    "onnxruntime": "onnxruntime_candidates",
    "openvino": "openvino_candidates",
}
SAME = 1e-5
"""KL of an engine's float model from ours by which its export and its positions are right."""
LARGER = 1.02
"""Sizes within this factor count as equal: scales of whole rows and zero points."""
HEADING = (
    f"{'engine':<12} {'weights':<34} {'rows of x':<19} {'bytes':>9} {'bits':>6} {'head':>6} "
    f"{'ppl':>8} {'KL':>9} {'top-1':>7}  beside ours"
)


@dataclass(frozen=True)
class Row:
    """Bits per weight with scales: all of them, those of the blocks, those of the head; `total` in bytes."""

    engine: str
    name: str
    activations: str
    total: int
    bits: float
    linears: float
    head: float
    perplexity: float
    kl: float
    agreement: float
    exact: bool
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.engine:<12} {self.name:<34} {self.activations:<19} {self.total:9d} {self.linears:6.2f} "
            f"{self.head:6.2f} {self.perplexity:8.3f} {self.kl:9.2e} {self.agreement:7.2%}"
        )


class Judge:
    """Scores of the float program on the held-out windows, kept; a candidate is run on the same windows."""

    def __init__(self, work: Work) -> None:
        self.work = work
        call = in_torch(work.program)
        self.floats = [torch.from_numpy(call(ids)) for ids in work.held]

    def row(self, candidate: Candidate) -> Row:
        kl = loss = agreed = count = 0.0
        for ids, exact in zip(self.work.held, self.floats, strict=True):
            found, wanted = torch.from_numpy(candidate.logits(ids)), torch.from_numpy(ids)
            if found.shape != exact.shape or not bool(found.isfinite().all()):
                raise ValueError(
                    f"{candidate.name} gives scores {list(found.shape)}, expected finite {list(exact.shape)}"
                )
            kl += float(kl_rows(exact[:-1], found[:-1]).sum())
            loss += float(F.cross_entropy(found[:-1].double(), wanted[1:], reduction="sum"))
            agreed += float((exact[:-1].argmax(-1) == found[:-1].argmax(-1)).sum())
            count += len(ids) - 1
        linears, head = self.work.parameters
        stored = candidate.stored
        return Row(
            candidate.engine,
            candidate.name,
            candidate.rows,
            stored.total,
            8 * stored.total / (linears + head),
            8 * stored.linears / linears,
            8 * stored.head / head,
            perplexity(loss / count),
            kl / count,
            agreed / count,
            candidate.exact,
            candidate.note,
        )


def perplexity(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def measured(work: Work, engines: Sequence[str]) -> Iterator[Row]:
    judge = Judge(work)
    for engine in engines:
        try:
            module = import_module(f"benchmarks.quality.{ENGINES[engine]}")
        except ImportError as error:
            print(f"{engine:<12} skipped: {error}", flush=True)
            continue
        for candidate in module.candidates(work):
            row = judge.row(candidate)
            yield row
            if row.exact and row.kl > SAME:
                print(f"{engine:<12} skipped: its float model is not ours, KL {row.kl:.1e}", flush=True)
                break


def beside(row: Row, ours: Sequence[Row]) -> str:
    """The best of our rows that is no larger, in blocks, head and all, and the ratio of its KL to this row's."""
    fit = [own for own in ours if not own.exact and no_larger(own, row)]
    if row.exact or row.engine == "sylvester" or not fit:
        return ""
    best = min(fit, key=lambda own: own.kl)
    return f"{best.kl / row.kl:.2f} x KL by {best.name}"


def no_larger(own: Row, other: Row) -> bool:
    pairs = ((own.linears, other.linears), (own.head, other.head), (own.total, other.total))
    return all(mine <= LARGER * theirs for mine, theirs in pairs)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        work = load(options, Path(folder))
        print(HEADING, flush=True)
        for row in measured(work, options.engines):
            found.append(row)
            verdict = beside(row, [own for own in found if own.engine == "sylvester"])
            print(f"{row}  {verdict}", flush=True)
            write(options.json, found)


def write(path: Path | None, rows: Sequence[Row]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="folder of .txt files to fit to; without it nothing is fitted")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
