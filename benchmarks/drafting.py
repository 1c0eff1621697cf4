"""Drafting on the shipped language model: time of generation beside plain decoding, the same tokens checked.

    python -m benchmarks.drafting --calibration FOLDER [--threads 1] [--tokens 200] [--prompts 10] [--json FILE]

FOLDER has .txt files that int4 drafts are fitted to. Every prompt is new to every model, so that n-grams know no more
of it than they read; plain decoding and drafting take turns on one artefact. Prose: 100 tokens of held-out text, greedy
and sampled. Repetitive: a held-out passage that begins again, greedy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import sylvester as sv
from benchmarks.quality.recipes import HELD, MODEL

DRAFTS: dict[str, Any] = {
    "n-grams": "ngram",
    "int4": "quantize(weights=4, activations=8)",
    "int4 and n-grams": ["quantize(weights=4, activations=8)", "ngram"],
    "layers skipped, 1.5x": "skip-layers(speedup=1.5)",
    "swift": "swift",
    "exit": "exit",
}
PIECE = 3000
"""Characters of each text to fit to."""
PROSE, PASSAGE = 100, 120
"""Tokens of a prompt, and of a passage that begins again."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled (temperature 0.7, top-p 0.9)": {"temperature": 0.7, "top_p": 0.9, "seed": 0},
    "greedy, repetitive": {},
}


@dataclass(frozen=True)
class Row:
    """`ratio`: median over prompts of plain time over drafted time; `calls`: tokens that a call of the model makes."""

    draft: str
    way: str
    threads: int
    plain_ms: float
    ratio: float
    calls: float
    accepted: float

    def __str__(self) -> str:
        return (
            f"{self.draft:22} {self.way:38} plain {self.plain_ms:6.3f} ms a token  {self.ratio:5.2f}x  "
            f"{self.calls:5.2f} tokens a call, {self.accepted:4.0%} of drafts accepted"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = [path.read_text(encoding="utf-8")[:PIECE] for path in sorted(options.calibration.glob("*.txt"))]
    rows = []
    for row in measured(texts, options):
        rows.append(row)
        print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def measured(texts: Sequence[str], options: argparse.Namespace) -> Iterator[Row]:
    for name, draft in DRAFTS.items():
        with sv.compile(MODEL, draft=draft, calibration=texts, threads=options.threads) as model:
            ids = model.encode(HELD.read_text(encoding="utf-8"))
            for way, given in WAYS.items():
                prompts = chosen(ids, way, options.prompts)
                yield timed(model, name, way, prompts, {"max_new_tokens": options.tokens, "stop": (), **given}, options)


def chosen(ids: Sequence[int], way: str, count: int) -> list[np.ndarray]:
    """Prompts [1, length] at even distances, of other places for each way."""
    offset, length = 37 * list(WAYS).index(way), PASSAGE if "repetitive" in way else PROSE
    starts = [offset + i * (len(ids) - length - offset) // count for i in range(count)]
    found = [list(ids[start : start + length]) for start in starts]
    return [np.array([[*row, *row[: PASSAGE // 4]] if "repetitive" in way else [*row]]) for row in found]


def timed(
    model: sv.Compiled, name: str, way: str, prompts: Sequence[np.ndarray], given: dict[str, Any],
    options: argparse.Namespace,
) -> Row:  # fmt: skip
    ratios, plain, before = [], [], tally(model)
    for prompt in prompts:
        seconds, found = {}, {}
        for draft in (False, None):
            start = time.perf_counter()
            found[draft] = model.generate(prompt, draft=draft, reuse=False, **given)
            seconds[draft] = time.perf_counter() - start
        if not np.array_equal(found[False], found[None]):
            raise SystemExit(f"{name}, {way}: drafting changed the tokens")
        ratios.append(seconds[False] / seconds[None])
        plain.append(1e3 * seconds[False] / options.tokens)
    made, rounds, accepted, drafted = (after - b for after, b in zip(tally(model), before, strict=True))
    calls, share = made / max(1, rounds), accepted / max(1, drafted)
    return Row(name, way, options.threads, median(plain), median(ratios), calls, share)


def tally(model: sv.Compiled) -> tuple[int, int, int, int]:
    done = model.drafting
    return done.made, done.rounds, done.accepted, done.drafted


if __name__ == "__main__":
    main()
