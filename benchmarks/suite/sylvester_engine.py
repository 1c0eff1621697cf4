"""This compiler, from the model folder, with the recipe of a precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import sylvester as sv
from benchmarks.measure import Engine
from benchmarks.suite.maker import Task
from benchmarks.suite.shapes import token_ids
from benchmarks.suite.sizes import CONTEXT, PROMPT, SEQUENCE

RECIPES = {"fp32": (), "bf16": "bf16", "int8": "w8a8", "int4": "w4a8"}


def build(task: Task) -> Engine:
    step = _zoo(task) if task.work.kind == "zoo" else _full(task)
    return Engine("sylvester", task.precision, step, lambda: np.asarray(step(), np.float64))


def _full(task: Task) -> Callable[[], NDArray[Any]]:
    work, options = task.work, {"passes": RECIPES[task.precision], "threads": task.threads}
    ids = token_ids(work.shape, work.batch, SEQUENCE if work.kind == "encode" else PROMPT)
    if work.kind == "encode":
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return encode_step(sv.compile(task.checkpoint.load(), inputs, **options), inputs)
    compiled = sv.compile(task.checkpoint.folder, **options)
    if work.kind == "decode":
        return decode_step(compiled, ids[:, : CONTEXT + 1].numpy())
    return prefill_step(compiled, ids.numpy())


def _zoo(task: Task) -> Callable[[], NDArray[Any]]:
    from benchmarks.suite.vision import case as case_of
    from tests import zoo

    case = case_of(task.work.shape)
    compiled = sv.compile(case.model, dict(case.inputs), dynamic=case.dynamic, threads=task.threads)

    def step() -> NDArray[Any]:
        result = compiled(**case.inputs)
        return zoo.tensors(dict(result) if isinstance(result, dict) else result)[0].numpy()

    return step


def encode_step(compiled: sv.Compiled, inputs: dict[str, Tensor]) -> Callable[[], NDArray[Any]]:
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: np.asarray(compiled(**arrays).last_hidden_state)


def decode_step(compiled: sv.Compiled, ids: NDArray[Any]) -> Callable[[], NDArray[Any]]:
    """The last of `ids` after the others, the cache position set back after each call."""
    runner, context = compiled._runner, {"input_ids": ids[:, :-1]}
    entry, length = first_entry(compiled), ids.shape[1] - 1
    state = runner.new_state(entry, context)
    runner.run(entry, context, state)
    last = ids[:, -1:].copy()

    def step() -> NDArray[Any]:
        state.position = length
        return np.asarray(runner.run("decode", {"input_ids": last}, state)["logits"])

    return step


def prefill_step(compiled: sv.Compiled, ids: NDArray[Any]) -> Callable[[], NDArray[Any]]:
    """Logits of the last position of a prompt, into caches that are used again."""
    runner, inputs, entry = compiled._runner, {"input_ids": ids}, first_entry(compiled)
    state = runner.new_state(entry, inputs)

    def step() -> NDArray[Any]:
        state.position = 0
        return np.asarray(runner.run(entry, inputs, state)["logits"])[:, -1:]

    return step


def first_entry(compiled: sv.Compiled) -> str:
    """`start` gives the logits of the last position only, `prefill` those of all."""
    return "start" if "start" in compiled.entries else "prefill"
