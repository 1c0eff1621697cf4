"""One step of a work: by artefacts of this compiler, and by PyTorch in the forms that are fast on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import sylvester as sv
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.works import Sizes, Work
from benchmarks.suite.llama import Llama
from benchmarks.suite.sylvester_engine import first_entry
from sylvester.compiler.compiled import Compiled

SHORT = (sv.passes.QuantizeCache(), sv.passes.QuantizeAttention())
Step = Callable[[], NDArray[np.int64]]
"""Chooses the best next token [batch] of every row; the ids come to the host."""
RECIPES: dict[str, Any] = {
    "bf16": "bf16",
    "int8": [sv.passes.RotateHadamard(), sv.passes.Quantize(weights=8), *SHORT],
    "fp8": "fp8",
    "int4": "w4a8",
}
FROM = {"fp8": "sm_89"}
"""The least architectures that have the arithmetic of a precision."""


def ours(machine: Machine, folder: Path, precision: str, sizes: Sizes, tune: float | None) -> Compiled:
    """One artefact for both kinds of work."""
    options = {"max_length": sizes.capacity, "tune": tune}
    return machine.compile(folder, target=options, passes=RECIPES[precision])


def our_step(compiled: Compiled, work: Work, ids: Tensor, sizes: Sizes) -> Step:
    runner: Any = compiled._runner
    prompt = {"input_ids": ids.numpy()[:, : sizes.prompt if work.kind == "prefill" else sizes.context]}
    state = runner.new_state(first_entry(compiled), prompt)
    if work.kind == "prefill":
        return partial(_chosen, runner, first_entry(compiled), prompt, state, 0)
    _chosen(runner, first_entry(compiled), prompt, state, 0)
    token = {"input_ids": ids.numpy()[:, sizes.context : sizes.context + 1]}
    return partial(_chosen, runner, "decode", token, state, sizes.context)


def _chosen(runner: Any, entry: str, inputs: Mapping[str, Any], state: Any, position: int) -> NDArray[np.int64]:
    state.position = position
    return np.asarray(runner.there(entry, inputs, state)["logits"][:, -1].argmax(), np.int64)


class Static(Llama):
    """A Llama over caches [batch, heads, capacity, width] at fixed places, as CUDA graphs of torch.compile want it."""

    def allocate(self, batch: int, capacity: int, like: Tensor) -> None:
        shape = (self.layers, batch, self.shared, capacity, self.width)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.frequencies = self.frequencies.to(like.device)

    def prefill(self, ids: Tensor) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, :, :, : ids.shape[1]] = k
            self.values[layer, :, :, : ids.shape[1]] = v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.last_logits(ids, positions, attend)[:, -1].argmax(-1)

    def decode(self, ids: Tensor, past: Tensor, seen: int) -> Tensor:
        """`seen`: how many keys are read."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer].index_copy_(2, past, k)
            self.values[layer].index_copy_(2, past, v)
            keys, values = self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        return self.last_logits(ids, past[None], attend)[:, -1].argmax(-1)


def torch_step(machine: Machine, model: nn.Module, work: Work, ids: Tensor, sizes: Sizes, compiled: bool) -> Step:
    """In the dtype of the model, on the place of the machine."""
    weight, length = next(model.parameters()), sizes.prompt if work.kind == "prefill" else sizes.context
    llama = Static(model)
    llama.allocate(work.batch, sizes.capacity, weight)
    ids = ids.to(machine.place)
    wrap: Any = partial(torch.compile, mode="max-autotune", dynamic=False) if compiled else lambda f: f
    if work.kind == "prefill":
        run = partial(wrap(llama.prefill), ids[:, :length])
    else:
        llama.prefill(ids[:, :length])
        past = torch.full((1,), length, device=machine.place)
        run = partial(wrap(llama.decode), ids[:, length : length + 1], past, length + 1)

    def step() -> NDArray[np.int64]:
        with torch.inference_mode():
            return run().cpu().numpy()

    return step


def torchao(model: nn.Module, precision: str, kind: str) -> nn.Module:
    """torchao's own choice: int8 rows and weights for prompts, weights alone for one token, int4 in groups of 128."""
    from torchao import quantization

    if precision == "int4":
        chosen = quantization.Int4WeightOnlyConfig(group_size=128)
    elif kind == "decode":
        chosen = quantization.Int8WeightOnlyConfig()
    else:
        chosen = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, chosen)
    return model
