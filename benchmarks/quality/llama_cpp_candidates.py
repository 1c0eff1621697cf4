"""llama.cpp: its own quantiser on the float32 GGUF file, all matrices alike or with its choice for the head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as ggml
import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.candidates import Candidate, Ids, Logits, Stored, Work
from benchmarks.suite import gguf_llama
from benchmarks.suite.llama_cpp_engine import batch, opened, run

ROWS = "int8, blocks of 32"
TYPES = {"Q4_0": 2, "Q8_0": 7}


def candidates(work: Work) -> Iterator[Candidate]:
    plain = work.folder / "fp32.gguf"
    gguf_llama.write(plain, work.checkpoint, "fp32")
    yield candidate(work, plain, "fp32", exact=True)
    for name, number in TYPES.items():
        for pure in (True, False) if name == "Q4_0" else (True,):
            path = work.folder / f"{name}-{pure}.gguf"
            quantize(plain, path, number, pure)
            yield candidate(work, path, name if pure else f"{name}, default head")


def quantize(source: Path, path: Path, number: int, pure: bool) -> None:
    options = ggml.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread = number, pure, 1
    if code := ggml.llama_model_quantize(str(source).encode(), str(path).encode(), options):
        raise RuntimeError(f"llama_model_quantize gave code {code}")


def candidate(work: Work, path: Path, name: str, exact: bool = False) -> Candidate:
    rows = "float32" if exact else ROWS
    stored, kinds = measured(path)
    return Candidate("llama.cpp", name, rows, stored, logits(work, path), exact, note=f"head {kinds}")


def measured(path: Path) -> tuple[Stored, str]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    head = tensors.pop("token_embd.weight")
    linears = sum(int(t.n_bytes) for t in tensors.values() if len(t.shape) == 2)
    return Stored(linears, int(head.n_bytes)), head.tensor_type.name


def logits(work: Work, path: Path) -> Logits:
    """Caches are float32, as everywhere here: only weights and rows of x differ."""
    context: list[Any] = []
    vocabulary = work.checkpoint.config.vocab_size

    def call(ids: Ids) -> NDArray[np.float32]:
        if not context:
            context.append(opened(str(path), work.threads, exact=True))
        ggml.llama_memory_clear(ggml.llama_get_memory(context[0]), True)
        asked = batch(ids.tolist(), 0)
        for index in range(len(ids)):
            asked.logits[index] = True
        run(context[0], asked)
        return np.ctypeslib.as_array(ggml.llama_get_logits(context[0]), (len(ids), vocabulary)).copy()

    return call
