"""Small artefacts of the target `cuda` that need no Triton compiler, for tests of the runtime."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

import sylvester as sv
from sylvester.backends.cuda import backend, emulated, runtime
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.manifest import read
from sylvester.compiler.program import Program
from tests import zoo

VOCAB, LENGTH = 50, 96
_FOLDER = tempfile.TemporaryDirectory(prefix="sylvester-cuda-models-")


@cache
def program(layers: int = 1) -> Program:
    """Layers with grouped heads, and tied embeddings."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=layers, hidden_size=32, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, use_cache=False, pad_token_id=None, eos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    zoo.randomise(model)
    return sv.trace(model, {"input_ids": torch.randint(3, VOCAB, (2, 7))})


@cache
def reference() -> Compiled:
    """`program` in PyTorch, made once in this process."""
    return sv.compile(program().clone(), target="reference")


@cache
def folder() -> Path:
    """The artefact of `program`, made once in this process."""
    return saved(program(), Path(_FOLDER.name, "made"))


def saved(program: Program, folder: Path, **options: object) -> Path:
    """An artefact for `Emulated`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "build", emulated.build)
        with sv.compile(program.clone(), target=sv.Target("cuda", arch="sm_90"), **options) as compiled:
            return compiled.save(folder)


def opened(folder: Path, device: object) -> Compiled:
    """The artefact on a device."""
    return Compiled(folder, runner=runtime.GpuRunner(folder, read(folder), device))


def ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (batch, length))
