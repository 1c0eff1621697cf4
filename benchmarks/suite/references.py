"""Outputs in float64, kept beside the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.suite.cache import cached
from benchmarks.suite.llama import Llama
from benchmarks.suite.shapes import Checkpoint, token_ids
from benchmarks.suite.sizes import CONTEXT, PROMPT, SEQUENCE
from benchmarks.suite.works import Work


def exact(work: Work, models: Path) -> NDArray[np.float64]:
    """Logits of the one position that is asked for, or the hidden states of an encoder."""
    checkpoint = Checkpoint(work.shape, models)
    if work.kind == "encode":
        path = checkpoint.file(f"exact-{work.batch}.npy")
        return np.load(cached(path, write_encoded, checkpoint, work.batch))
    logits = np.load(cached(checkpoint.file("exact.npy"), write_logits, checkpoint))
    return logits[0 if work.kind == "decode" else 1]


def write_encoded(path: Path, checkpoint: Checkpoint, batch: int) -> None:
    ids = token_ids("B", batch, SEQUENCE)
    with torch.inference_mode():
        hidden = checkpoint.load(torch.float64)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    np.save(path, hidden.numpy())


def write_logits(path: Path, checkpoint: Checkpoint) -> None:
    """[2, vocabulary]: after CONTEXT + 1 tokens and after PROMPT tokens. One matrix at a time is held in float64."""
    model = checkpoint.load()
    ids = token_ids(checkpoint.shape, 1, PROMPT)
    with torch.inference_mode():
        llama = Wide(model)
        hidden = llama.hidden(ids, torch.arange(PROMPT)[None], attend)[0, [CONTEXT, PROMPT - 1]]
        weight = model.lm_head.weight
        logits = [hidden @ part.double().T for part in weight.split(8192)]
    np.save(path, torch.cat(logits, -1).numpy())


def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Wide(Llama):
    """Computes in float64 over parameters that stay as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = lambda x, own=module: x @ own.weight.double().T
        tokens = model.model.embed_tokens
        tokens.forward = lambda ids: F.embedding(ids, tokens.weight).double()
