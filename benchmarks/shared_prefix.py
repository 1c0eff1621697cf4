"""A batch whose prompts begin alike, the beginning read and kept once, beside reading and keeping it in every row.

    python -m benchmarks.shared_prefix [--threads 2] [--rows 16] [--prefix 4096] [--own 64] [--runs 9] [--json FILE]

A Llama shape of random weights whose caches are most of what decoding reads: 2 layers of width 256, 8 query heads of 64
features. Two sessions of one artefact take turns at some steps of all rows, the first of a turn not timed; both first
continue the prompts greedily, and the tokens must be the same. "attention" is the time of the attention kernels in a
step, "prompt" the time to the first token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sylvester as sv
from sylvester.backends.kernel_table import read_table
from sylvester.compiler.prefix import Sharing, share
from sylvester.compiler.session import CHUNK, Session, ids_input

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

WIDTH, HEADS, FEATURES, LAYERS, VOCABULARY = 256, 8, 64, 2, 1024
CACHES: dict[str, Sequence[sv.passes.QuantizeCache]] = {"float32": (), "bfloat16": (sv.passes.QuantizeCache(),)}
TOKENS = 16
"""Tokens that both sessions continue with."""


@dataclass(frozen=True)
class Row:
    """Milliseconds of a step, of attention in it, and of the prompt: shared, and each row for itself."""

    key_heads: int
    caches: str
    step_ms: tuple[float, float]
    attention_ms: tuple[float, float]
    prompt_ms: tuple[float, float]

    def __str__(self) -> str:
        parts = [f"{self.key_heads} key heads, {self.caches:8}"]
        for name in ("step", "attention", "prompt"):
            shared, each = getattr(self, f"{name}_ms")
            parts.append(f"{name} {shared:8.2f} ms of {each:9.2f} ({each / shared:5.2f}x)")
        return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--key-heads", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for row in measured(options):
        rows.append(row)
        print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def measured(options: argparse.Namespace) -> Iterator[Row]:
    for key_heads in options.key_heads:
        for name, passes in CACHES.items():
            given = model(key_heads, options.prefix + options.own + TOKENS)
            example = (torch.randint(3, VOCABULARY, (2, 8)),)
            with sv.compile(given, example, passes=passes, threads=options.threads) as compiled:
                yield Row(key_heads, name, *timed(compiled, prompts(options), options.runs))


def model(key_heads: int, length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        head_dim=FEATURES, num_key_value_heads=key_heads, max_position_embeddings=length, vocab_size=VOCABULARY,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(options: argparse.Namespace) -> Ids:
    random = np.random.default_rng(0)
    begin = np.tile(random.integers(3, VOCABULARY, options.prefix), (options.rows, 1))
    return np.concatenate([begin, random.integers(3, VOCABULARY, (options.rows, options.own))], 1)


def timed(compiled: sv.Compiled, ids: Ids, runs: int) -> tuple[tuple[float, float], ...]:
    """(step, attention, prompt), each (shared, each row for itself) in milliseconds."""
    sessions, firsts, prompt = [], [], []
    for wanted in (True, False):
        session = Session.begin(compiled._runner, ids, CHUNK)
        start = time.perf_counter()
        share(session, ids, wanted, Sharing())
        firsts.append(session.feed(ids[:, session.position :]).argmax(-1))
        prompt.append(1e3 * (time.perf_counter() - start))
        sessions.append(session)
    found = [continued(session, first) for session, first in zip(sessions, firsts, strict=True)]
    if not np.array_equal(*found):
        raise SystemExit(f"sharing changed {(found[0] != found[1]).sum()} of {found[0].size} tokens")
    return *alternating(sessions, firsts[0], runs), (prompt[0], prompt[1])


def continued(session: Session, last: NDArray[Any]) -> Ids:
    """The next tokens [rows, TOKENS], greedily."""
    end, found = session.position, []
    for _ in range(TOKENS):
        last = session.feed(last[:, None]).argmax(-1)
        found.append(last)
    session.rewind(end)
    return np.stack(found, 1)


def alternating(sessions: Sequence[Session], tokens: Ids, runs: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Medians of a step, and of its attention kernels, of sessions that take turns."""
    runner: Any = sessions[0].runner
    kernels = read_table(runner.folder).entries["decode"]
    attends = np.array(["attention" in kernel.name for kernel in kernels])
    given = {ids_input(runner.manifest): tokens[:, None]}
    whole, parts = ([[], []], [[], []])
    for _ in range(runs + 1):
        for number, session in enumerate(sessions):
            runner.run("decode", given, session.state)
            start = time.perf_counter()
            runner.run("decode", given, session.state)
            whole[number].append(1e3 * (time.perf_counter() - start))
            times = np.zeros(len(kernels))
            runner.run("decode", given, session.state, times)
            parts[number].append(1e3 * float(times[attends].sum()))
    (a, b), (c, d) = ([median(found[1:]) for found in side] for side in (whole, parts))
    return (a, b), (c, d)


if __name__ == "__main__":
    main()
