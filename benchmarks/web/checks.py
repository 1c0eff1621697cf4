"""Whether an engine computes the model: its first tokens and probabilities, or its hidden states, beside PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.suite.shapes import Checkpoint
from benchmarks.web.sources import CHECKED, checkpoint
from benchmarks.web.works import PageWork

LIKELY = 20
"""Tokens whose probabilities are compared."""
EXACT = 2e-3
"""The most that fp32 engines may differ by."""


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of fp32 and the log-probabilities of what follows the prompt; or the hidden states."""

    tokens: tuple[int, ...]
    values: NDArray[np.float64]


def reference(work: PageWork, ids: list[int], models: Path) -> Reference:
    source = checkpoint(work.shape, models)
    with torch.inference_mode():
        return hidden_states(source, ids) if work.kind == "encode" else greedy(source, ids)


def hidden_states(source: Checkpoint, ids: list[int]) -> Reference:
    given = torch.tensor([ids])
    hidden = source.load(torch.float64)(input_ids=given, attention_mask=torch.ones_like(given)).last_hidden_state
    return Reference((), hidden.flatten().numpy())


def greedy(source: Checkpoint, ids: list[int]) -> Reference:
    model, text = source.load(), list(ids)
    first: NDArray[np.float64] | None = None
    for _ in range(CHECKED):
        logits = model(input_ids=torch.tensor([text])).logits[0, -1]
        first = logits.double().log_softmax(-1).numpy() if first is None else first
        text.append(int(logits.argmax()))
    assert first is not None
    return Reference(tuple(text[len(ids) :]), first)


def difference(answer: dict[str, Any], expected: Reference) -> float:
    """Largest relative error of hidden states, or mean difference of log-probabilities over the most likely tokens."""
    if "hidden" in answer:
        return float(np.abs(np.array(answer["hidden"]) - expected.values).max() / np.abs(expected.values).max())
    if "logprobs" in answer:
        return float(np.mean([abs(value - expected.values[token]) for token, value in answer["logprobs"][:LIKELY]]))
    logits = np.array(answer["logits"], np.float64)
    found = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    likely = np.argsort(expected.values)[-LIKELY:]
    return float(np.abs(found - expected.values)[likely].mean())


def agreeing(answer: dict[str, Any], expected: Reference) -> int:
    """How many tokens at the beginning are those of fp32."""
    pairs = zip(answer.get("tokens", ()), expected.tokens, strict=False)
    return next((n for n, (found, wanted) in enumerate(pairs) if found != wanted), len(expected.tokens))


def problem(precision: str, error: float, tokens: int, expected: Reference) -> str:
    """What is wrong with an fp32 engine; lower precisions may differ."""
    if precision != "fp32" or (error <= EXACT and tokens == len(expected.tokens)):
        return ""
    return f"another model: {tokens} of {len(expected.tokens)} tokens are those of PyTorch, error {error:.1e}"
