"""What is compared: a model as one engine stores it, the bytes of its matrices, and the logits that it gives."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import sylvester as sv
from benchmarks.quality.recipes import CHARACTERS, HELD, MODEL, WINDOW, windows
from benchmarks.suite.shapes import Checkpoint
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.program import Program

Ids = NDArray[np.int64]
Logits = Callable[[Ids], NDArray[np.float32]]
"""Token ids [tokens] -> scores [tokens, vocabulary]."""


@dataclass(frozen=True)
class Stored:
    """Bytes with all scales and zero points: linear layers of the blocks, the head, a table of the embedding apart."""

    linears: int
    head: int
    table: int = 0

    @property
    def total(self) -> int:
        return self.linears + self.head + self.table


@dataclass(frozen=True)
class Candidate:
    """`rows` is the arithmetic of the activations; `exact` marks the engine's own float model."""

    engine: str
    name: str
    rows: str
    stored: Stored
    logits: Logits
    exact: bool = False
    note: str = ""


class Shipped(Checkpoint):
    """The model of the examples, as the writers of the suite take it."""

    @functools.cached_property
    def folder(self) -> Path:
        return MODEL

    @property
    def config(self) -> LlamaConfig:
        return AutoConfig.from_pretrained(MODEL)


@dataclass(frozen=True)
class Work:
    """One model and its data for all engines, which keep files in `folder`."""

    checkpoint: Shipped
    program: Program
    fit: tuple[Ids, ...]
    held: tuple[Ids, ...]
    folder: Path
    threads: int

    @property
    def parameters(self) -> tuple[int, int]:
        """Of the linear layers of all blocks, and of the embedding, which is the head too."""
        matrices = {name: t.numel() for name, t in self.checkpoint.tensors().items() if t.ndim == 2}
        head = matrices.pop("model.embed_tokens.weight")
        return sum(matrices.values()), head


def load(options: argparse.Namespace, folder: Path) -> Work:
    """The traced float32 model; windows to fit to are there when a folder of texts is given."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    program = sv.trace(model, (torch.zeros((2, WINDOW), dtype=torch.long),))
    fit: tuple[dict[str, Tensor], ...] = ()
    if options.calibration:
        files = sorted(options.calibration.glob("*.txt"))
        fit = windows("\n".join(path.read_text(encoding="utf-8")[:CHARACTERS] for path in files), options.samples)
        program.calibration = Calibration(fit)
    held = windows(HELD.read_text(encoding="utf-8"), options.windows)
    ids: Any = [tuple(sample["input_ids"][0].numpy() for sample in part) for part in (fit, held)]
    return Work(Shipped("novels", folder), program, *ids, folder, options.threads)
