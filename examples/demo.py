"""`make demo`: compile the shipped language model, let it write, and compare with eager PyTorch on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import sylvester as sv

MODEL = Path(__file__).parent / "models" / "novels-7m"
PROMPT = "Once upon a time"
TOKENS, ROUNDS = 200, 5


def eager(model: Any, ids: torch.Tensor) -> list[int]:
    """Greedy decoding with PyTorch and the model's own key-value cache, without the checks of `model.generate`."""
    cache, found = None, []
    for _ in range(TOKENS):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(compiled: sv.Compiled, ids: np.ndarray) -> str:
    """Greedy tokens of both, then the median of interleaved runs, so that both see the same machine."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tensor = torch.from_numpy(ids)
    ours = list(compiled.generate(ids, TOKENS, stream=True, stop=()))
    with torch.inference_mode():
        theirs = eager(model, tensor)
        pairs = [
            (
                seconds(lambda: eager(model, tensor)),
                seconds(lambda: compiled.generate(ids, TOKENS, stop=(), reuse=False)),
            )
            for _ in range(ROUNDS)
        ]
    slow, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    same = "yes" if ours == theirs else f"no, they differ from token {first_difference(ours, theirs)}"
    return (
        f"same {TOKENS} greedy tokens as eager PyTorch: {same}\n"
        f"eager PyTorch {TOKENS / slow:.0f} tokens/s, compiled {TOKENS / fast:.0f} tokens/s: {ratio:.1f}x "
        f"(median of {ROUNDS} interleaved runs, {torch.get_num_threads()} threads)"
    )


def first_difference(one: list[int], two: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def main() -> None:
    logging.disable_progress_bar()
    start = time.perf_counter()
    compiled = sv.compile(MODEL, target="cpu")
    print(f"compiled {MODEL.name} in {time.perf_counter() - start:.1f} s\n{compiled.ledger}\n")

    print(PROMPT, end="", flush=True)
    for piece in compiled.generate(PROMPT, max_new_tokens=TOKENS, stream=True, temperature=0.7, top_p=0.95, seed=1):
        print(piece, end="", flush=True)

    print("\n\n" + compare(compiled, np.array([compiled.encode(PROMPT)])))


if __name__ == "__main__":
    main()
