"""PyTorch eager, torch.compile and torchao, each in the form that is fast for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.measure import Engine
from benchmarks.suite.llama import Cached
from benchmarks.suite.maker import Task
from benchmarks.suite.shapes import token_ids
from benchmarks.suite.sizes import CONTEXT, PROMPT, SEQUENCE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}


def eager(task: Task) -> Engine:
    return _engine("torch", task, _eager_step(task))


def compiled(task: Task) -> Engine:
    return _engine("torch.compile", task, _compiled_step(task, task.checkpoint_module(DTYPES[task.precision])))


def frozen(task: Task) -> Engine:
    """Inductor may then fold and pack the weights."""
    step = _compiled_step(task, task.checkpoint_module(DTYPES[task.precision]), {"freezing": True})
    return _engine("torch.compile freezing", task, step)


def quantized(task: Task) -> Engine:
    """torchao under torch.compile: dynamic int8 activations for many rows, weights only for one row."""
    from torchao.quantization import quantize_

    dtype = torch.float32 if task.precision == "int8" and task.work.kind != "decode" else torch.bfloat16
    model = task.checkpoint_module(dtype)
    if hasattr(model, "lm_head"):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    quantize_(model, _recipe(task))
    return _engine("torchao", task, _compiled_step(task, model, {"freezing": True}))


def _recipe(task: Task) -> Any:
    if task.precision == "int4":
        from torchao.prototype.quantization.int4 import inference_workflow as prototype

        return prototype.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if task.work.kind == "decode" else Int8DynamicActivationInt8WeightConfig()


def _engine(name: str, task: Task, step: Callable[[], Tensor]) -> Engine:
    def run() -> Tensor:
        with torch.inference_mode():
            return step()

    def output() -> NDArray[Any]:
        return np.asarray(run().double())

    return Engine(name, task.precision, run, output)


def _eager_step(task: Task) -> Callable[[], Tensor]:
    dtype = DTYPES[task.precision]
    model = task.checkpoint_module(dtype)
    if task.work.kind in ("encode", "zoo"):
        return _module_step(task, model)
    llama, ids = _cached(task, model, dtype)
    return partial(llama.decode_sliced, ids, CONTEXT) if task.work.kind == "decode" else partial(llama.prefill, ids)


def _compiled_step(task: Task, model: nn.Module, options: dict[str, Any] | None = None) -> Callable[[], Tensor]:
    build = partial(torch.compile, dynamic=False, options=options)
    if task.work.kind in ("encode", "zoo"):
        return _module_step(task, build(model))
    dtype = next(p.dtype for p in model.parameters() if p.ndim == 1)
    llama, ids = _cached(task, model, dtype)
    if task.work.kind == "prefill":
        return partial(build(llama.prefill), ids)
    mask = torch.zeros(1, 1, 1, CONTEXT + 16, dtype=dtype)
    mask[..., CONTEXT + 1 :] = -torch.inf
    return partial(build(llama.decode), ids, torch.tensor([CONTEXT]), mask)


def _cached(task: Task, model: nn.Module, dtype: torch.dtype) -> tuple[Cached, Tensor]:
    """The caches hold CONTEXT tokens; what is left to run is the next token, or the whole prompt."""
    llama, ids = Cached(model), token_ids(task.work.shape, 1, PROMPT)
    if task.work.kind == "prefill":
        llama.allocate(PROMPT, dtype)
        return llama, ids
    llama.allocate(CONTEXT + 16, dtype)
    with torch.inference_mode():
        llama.prefill(ids[:, :CONTEXT])
    return llama, ids[:, CONTEXT : CONTEXT + 1].clone()


def _module_step(task: Task, model: Callable[..., Any]) -> Callable[[], Tensor]:
    if task.work.kind == "zoo":
        from benchmarks.suite.vision import case
        from tests import zoo

        inputs = case(task.work.shape).inputs
        return lambda: zoo.tensors(model(**inputs))[0]
    ids = token_ids("B", task.work.batch, SEQUENCE)
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state
