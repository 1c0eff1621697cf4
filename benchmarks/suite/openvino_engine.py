"""OpenVINO's CPU plugin in latency mode with one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from benchmarks.measure import CALLS, Engine
from benchmarks.suite import openvino_models as models
from benchmarks.suite.cache import cached
from benchmarks.suite.maker import Task
from benchmarks.suite.shapes import token_ids
from benchmarks.suite.sizes import CONTEXT, PROMPT, SEQUENCE

HINTS = {
    "fp32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
}
"""Other precisions leave the choice of the arithmetic to the plugin, and all but fp32 that of the caches."""


def build(task: Task) -> Engine:
    return encoder(task) if task.work.kind == "encode" else language_model(task)


def options(task: Task) -> dict[str, Any]:
    fixed = {"INFERENCE_NUM_THREADS": task.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    return fixed | HINTS.get(task.precision, {})


def file(task: Task) -> Path:
    """The plain model serves fp32 and bf16."""
    place = task.checkpoint
    bert = task.work.kind == "encode"
    plain = cached(place.file("openvino.xml"), models.write_bert if bert else models.write_llama, place)
    if task.precision in HINTS:
        return plain
    name = place.file(f"openvino-{task.precision}.xml")
    if bert:
        return cached(name, models.write_calibrated, plain)
    return cached(name, models.write_compressed, plain, task.precision)


def encoder(task: Task) -> Engine:
    ids = token_ids("B", task.work.batch, SEQUENCE).numpy()
    model = ov.Core().read_model(file(task))
    model.reshape({name: list(ids.shape) for name in ("input_ids", "attention_mask")})
    request = ov.Core().compile_model(model, "CPU", options(task)).create_infer_request()
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def step() -> Any:
        return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    return Engine("openvino", task.precision, step, lambda: np.array(step(), np.float64))


def language_model(task: Task) -> Engine:
    request = ov.Core().compile_model(file(task), "CPU", options(task)).create_infer_request()
    ids, beam = token_ids(task.work.shape, 1, PROMPT).numpy(), np.zeros(1, np.int32)

    def run(part: NDArray[Any], first: int) -> Any:
        positions = np.arange(first, first + part.shape[1])[None]
        given = {"input_ids": part, "position_ids": positions, "beam_idx": beam}
        return request.infer(given, share_inputs=True, share_outputs=True)["logits"]

    def prefill() -> Any:
        request.reset_state()
        return run(ids, 0)

    if task.work.kind == "prefill":
        return Engine("openvino", task.precision, prefill, lambda: np.array(prefill(), np.float64))
    decode = Decode(request, run, ids)
    return Engine("openvino", task.precision, decode, decode.output, decode.ready)


class Decode:
    """One token more at each call: the state cannot be cut, so it is made anew before a few calls around CONTEXT."""

    def __init__(self, request: Any, run: Any, ids: NDArray[Any]) -> None:
        self.request, self.run, self.ids = request, run, ids
        self.position = 0

    def __call__(self) -> Any:
        logits = self.run(self.ids[:, CONTEXT : CONTEXT + 1], self.position)
        self.position += 1
        return logits

    def ready(self, tokens: int = CONTEXT - CALLS // 2) -> None:
        self.request.reset_state()
        self.run(self.ids[:, :tokens].copy(), 0)
        self.position = tokens

    def output(self) -> NDArray[Any]:
        self.ready(CONTEXT)
        return np.array(self(), np.float64)
