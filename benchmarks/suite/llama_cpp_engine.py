"""llama.cpp through the C interface that llama-cpp-python binds."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as ggml
import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Engine
from benchmarks.suite import gguf_llama
from benchmarks.suite.cache import cached
from benchmarks.suite.maker import Task
from benchmarks.suite.shapes import token_ids
from benchmarks.suite.sizes import CAPACITY, CONTEXT, LLAMAS, PROMPT


@ggml.llama_log_callback
def quiet(level: int, text: bytes, data: Any) -> None:
    """The library writes pages to stderr unless it is given a place for them."""


def build(task: Task) -> Engine:
    path = cached(task.checkpoint.file(f"{task.precision}.gguf"), gguf_llama.write, task.checkpoint, task.precision)
    context = opened(str(path), task.threads, exact=task.precision == "fp32")
    memory = ggml.llama_get_memory(context)
    ids = token_ids(task.work.shape, 1, PROMPT)[0].tolist()
    decode = task.work.kind == "decode"
    kept = CONTEXT if decode else 0
    if decode:
        run(context, batch(ids[:CONTEXT], 0))
    asked = batch([ids[CONTEXT]], CONTEXT) if decode else batch(ids, 0)

    def step() -> None:
        ggml.llama_memory_seq_rm(memory, 0, kept, -1)
        run(context, asked)

    def output() -> NDArray[Any]:
        step()
        values = ggml.llama_get_logits_ith(context, asked.n_tokens - 1)
        return np.ctypeslib.as_array(values, (int(LLAMAS[task.work.shape]["vocab_size"]),)).astype(np.float64)

    return Engine("llama.cpp", task.precision, step, output)


def opened(path: str, threads: int, *, exact: bool) -> Any:
    """`exact` keeps the caches in fp32, which are fp16 otherwise."""
    ggml.llama_backend_init()
    ggml.llama_log_set(quiet, ctypes.c_void_p(0))
    model = ggml.llama_model_load_from_file(path.encode(), ggml.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    options = ggml.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = CAPACITY, PROMPT, PROMPT
    options.n_threads, options.n_threads_batch = threads, threads
    if exact:
        options.type_k = options.type_v = ggml.GGML_TYPE_F32
    return ggml.llama_init_from_model(model, options)


def batch(ids: list[int], first: int) -> Any:
    """Tokens of sequence 0 from a position on; logits are asked for at the last."""
    made = ggml.llama_batch_init(len(ids), 0, 1)
    made.n_tokens = len(ids)
    for index, token in enumerate(ids):
        made.token[index], made.pos[index] = token, first + index
        made.n_seq_id[index], made.seq_id[index][0] = 1, 0
        made.logits[index] = index == len(ids) - 1
    return made


def run(context: Any, given: Any) -> None:
    if code := ggml.llama_decode(context, given):
        raise RuntimeError(f"llama_decode gave code {code}")
    ggml.llama_synchronize(context)
