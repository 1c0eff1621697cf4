"""onnxruntime on the CPU: IO binding, and cache buffers that are both the past and the present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.measure import Engine
from benchmarks.suite import onnx_bert, onnx_llama
from benchmarks.suite.cache import cached
from benchmarks.suite.maker import Task
from benchmarks.suite.shapes import token_ids
from benchmarks.suite.sizes import CONTEXT, LLAMAS, PROMPT, SEQUENCE


def build(task: Task) -> Engine:
    write = onnx_bert.write if task.work.kind == "encode" else onnx_llama.write
    path = task.checkpoint.file(f"{task.precision}.onnx")
    current = session(cached(path, write, task.checkpoint, task.precision), task.threads)
    binding = encode(task, current) if task.work.kind == "encode" else language_model(task, current)

    def step() -> None:
        current.run_with_iobinding(binding)

    def output() -> NDArray[Any]:
        step()
        return binding.copy_outputs_to_cpu()[-1].astype(np.float64)

    return Engine("onnxruntime", task.precision, step, output)


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def encode(task: Task, current: ort.InferenceSession) -> Any:
    ids = token_ids("B", task.work.batch, SEQUENCE).numpy()
    binding = current.io_binding()
    for given, value in zip(current.get_inputs(), (ids, np.ones_like(ids)), strict=True):
        binding.bind_cpu_input(given.name, value.astype(np.int32) if "int32" in given.type else value)
    binding.bind_output("hidden", "cpu")
    return binding


def language_model(task: Task, current: ort.InferenceSession) -> Any:
    ids = token_ids(task.work.shape, 1, PROMPT).numpy()
    if task.work.kind == "prefill":
        return bound(current, ids, PROMPT, buffers(task.work.shape, PROMPT))
    caches = buffers(task.work.shape, CONTEXT + 16)
    current.run_with_iobinding(bound(current, ids[:, :CONTEXT].copy(), CONTEXT, caches))
    return bound(current, ids[:, CONTEXT : CONTEXT + 1].copy(), CONTEXT + 1, caches)


def buffers(shape: str, capacity: int) -> dict[str, ort.OrtValue]:
    """Caches of zeros, each over a numpy array of its own, which it does not copy."""
    sizes = LLAMAS[shape]
    width = int(sizes["hidden_size"]) // int(sizes["num_attention_heads"])
    dims = (1, int(sizes["num_key_value_heads"]), capacity, width)
    names = [f"{layer}.{kind}" for layer in range(int(sizes["num_hidden_layers"])) for kind in ("key", "value")]
    return {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(dims, np.float32)) for name in names}


def bound(current: ort.InferenceSession, ids: NDArray[Any], total: int, caches: dict[str, ort.OrtValue]) -> Any:
    binding = current.io_binding()
    binding.bind_cpu_input("input_ids", ids)
    binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
    binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
    for name, buffer in caches.items():
        binding.bind_ortvalue_input(f"past.{name}", buffer)
        binding.bind_ortvalue_output(f"present.{name}", buffer)
    binding.bind_output("logits", "cpu")
    return binding
