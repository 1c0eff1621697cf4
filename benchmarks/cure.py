"""A quarter of the blocks of the shipped language model removed, shared or skipped, and won back by fine-tuning.

    python -m benchmarks.cure --calibration FOLDER --steps 400 --json cure.json

FOLDER holds .txt files to train on; held-out text is the one in examples/data. Checkpoints go to --work: after Ctrl-C
the same command goes on. Perplexity is that of all held-out windows; where decoding does other work than reading a
prompt, it is that of the tokens after a prompt of a quarter of each window, as in generation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from benchmarks.quality.recipes import HELD, MODEL, windows
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.ledger import Ledger
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.samples import read
from sylvester.compiler.student import PREFIXES, Student

RANKED = 24
"""Windows that blocks are ranked on."""
GENERATED = 1
"""Which of the prompts of training is measured: a quarter of the window."""
VARIANTS: dict[str, Callable[[], Pass]] = {
    "remove 4 of 16": lambda: sv.passes.ShareBlocks(remove=0.25),
    "remove 4 of 16 by similarity": lambda: sv.passes.ShareBlocks(remove=0.25, keep_first=2, rank="similarity"),
    "remove 4 of 16 by gates": lambda: sv.passes.ShareBlocks(remove=0.25, keep_first=2, rank="gates"),
    "share 16 -> 12": lambda: sv.passes.ShareBlocks(12, keep_first=2),
    "remove 2, share 14 -> 12": lambda: sv.passes.ShareBlocks(12, 0.125),
    "skip at 1.25x in decode": lambda: sv.passes.SkipLayers(speedup=1.25),
    "skip at 1.25x everywhere": lambda: sv.passes.SkipLayers(speedup=1.25, phase="all"),
}


@dataclass(frozen=True)
class Cured:
    """Perplexities on held-out text, bytes of all weights, what became of which layers, and the pace of training."""

    variant: str
    became: dict[str, str]
    original: float
    before: float
    after: float
    bytes_before: int
    bytes_after: int
    steps: int
    seconds: float
    tokens_per_second: float

    def __str__(self) -> str:
        lost, left = (100 * (p / self.original - 1) for p in (self.before, self.after))
        quality = f"{self.original:7.2f} {self.before:7.2f} ({lost:+6.1f} %) {self.after:7.2f} ({left:+5.1f} %)"
        pace = f"{self.steps:6} {self.seconds:7.0f} s {self.tokens_per_second:6.0f} tokens/s"
        return f"{self.variant:26} {quality} {self.bytes_after / self.bytes_before:7.3f} {pace}"


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    program = sv.trace(MODEL)
    texts = [path.read_text(encoding="utf-8") for path in sorted(options.calibration.glob("*.txt"))]
    if not texts:
        raise SystemExit(f"no .txt file in {options.calibration}")
    middle = [text[len(text) // 2 :][: options.characters // len(texts)] for text in texts]
    program.calibration = Calibration(windows("\n".join(text[:6000] for text in middle), RANKED))
    results = []
    print(f"{'variant':26} {'float':>7} {'before the cure':>18} {'after':>16} {'bytes':>7} {'steps':>6}", flush=True)
    for variant in options.variants:
        for found in cured(program, variant, middle, options):
            results.append(found)
            print(found, flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of .txt files to train on")
    parser.add_argument("--steps", type=int, nargs="+", default=[400], help="lengths of the cure, one run each")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--characters", type=int, default=3_000_000, help="how much text, evenly from all files")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--tail", type=float, default=0.0, help="weight of the last hidden states")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where training runs, such as cuda")
    parser.add_argument("--work", type=Path, default=Path("build/cure"), help="checkpoints")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args()


def cured(program: sv.Program, variant: str, texts: list[str], options: argparse.Namespace) -> Iterator[Cured]:
    changed, ledger = Pipeline((VARIANTS[variant](),), check=False).run(program)
    device = torch.device(options.device)
    student = Student(changed, device=device)
    held = read(program, [HELD.read_text(encoding="utf-8")])
    original = perplexity(Student(program, staged=False, device=device), held, student)
    before = perplexity(student, held, student)
    for steps in options.steps:
        pace = Pace(variant, options.batch * options.window)
        trained = sv.finetune(
            changed, texts, steps, teacher=program, learning_rate=options.learning_rate, batch=options.batch,
            window=options.window, tail=options.tail, device=options.device,
            checkpoint=options.work / f"{variant}-{steps}", progress=pace,
        )  # fmt: skip
        after = perplexity(Student(trained, device=device), held, student)
        sizes = (program.weights.nbytes, trained.weights.nbytes)
        yield Cured(
            variant, became(ledger), original, before, after, *sizes, steps, pace.seconds, pace.tokens_per_second
        )


def became(ledger: Ledger) -> dict[str, str]:
    return {f"{b.layer}/{b.part}": b.what for row in ledger.rows for b in row.changes.layers}


def perplexity(model: Student, samples: tuple[dict[str, Tensor], ...], like: Student) -> float:
    """Of the tokens that `like` scores by generation: all but the first, or those after the prompt."""
    total, count = 0.0, 0
    for sample in samples:
        tokens = sample["input_ids"]
        first = max(1, tokens.shape[1] // PREFIXES[GENERATED]) if like.staged else 0
        with torch.no_grad():
            answer = model(model.own, sample, GENERATED)
        scores = answer.values["logits"][0, first - answer.first : -1].double().cpu()
        total += float(F.cross_entropy(scores, tokens[0, first + 1 :], reduction="sum"))
        count += len(scores)
    return float(torch.tensor(total / count).exp())


class Pace:
    """Steps on one line of the terminal, and how long they took."""

    def __init__(self, variant: str, tokens: int) -> None:
        self.variant, self.tokens, self.steps = variant, tokens, 0
        self.start = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.steps += 1
        self.seconds = time.perf_counter() - self.start
        print(f"\r{self.variant}: {done}/{total} {stage}   ", end="\n" if done == total else "", flush=True)

    seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens * self.steps / self.seconds if self.steps else 0.0


if __name__ == "__main__":
    main()
