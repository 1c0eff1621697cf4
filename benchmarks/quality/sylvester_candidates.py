"""This compiler: passes on the float program, run as the artefact of the `cpu` target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

import sylvester as sv
from benchmarks.quality.candidates import Candidate, Ids, Logits, Stored, Work
from sylvester.compiler.next_token import run
from sylvester.compiler.pipeline import Pass
from sylvester.compiler.program import Program
from sylvester.passes import Quantize

HEAD8 = {"*embed_tokens*": 8}
RECIPES: Mapping[str, tuple[Pass, ...]] = {
    "fp32": (),
    "w8a8": (Quantize(weights=8),),
    "w8a16": (Quantize(weights=8, activations=None),),
    "w8a16/32": (Quantize(weights=8, activations=None, group=32),),
    "w4a8": (Quantize(weights=4),),
    "w4a16": (Quantize(weights=4, activations=None),),
    "w4a16, head 8": (Quantize(weights=4, activations=None, per_layer=HEAD8),),
}
FITTED: Mapping[str, tuple[Pass, ...]] = {
    "w8a8 gptq": (Quantize(weights=8, method="gptq"),),
    "w8a16 gptq": (Quantize(weights=8, activations=None, method="gptq"),),
    "w8a16/32 gptq": (Quantize(weights=8, activations=None, group=32, method="gptq"),),
    "w4a8 gptq": (Quantize(weights=4, method="gptq"),),
    "w4a8 gptq, head 8": (Quantize(weights=4, method="gptq", per_layer=HEAD8),),
    "w4a16 gptq": (Quantize(weights=4, activations=None, method="gptq"),),
    "w4a16 gptq, head 8": (Quantize(weights=4, activations=None, method="gptq", per_layer=HEAD8),),
    "w4a16/64 gptq": (Quantize(weights=4, activations=None, group=64, method="gptq"),),
}
"""These need texts to fit to."""
HEAD = ("embed_tokens", "lm_head")
WIDTH_OF_SCALES = {True: 4, False: 2}
"""Bytes by whether a whole row shares one: kernels store the scales of groups in bfloat16."""


def candidates(work: Work) -> Iterator[Candidate]:
    for name, passes in {**RECIPES, **(FITTED if work.fit else {})}.items():
        program = rounded(work.program, passes)
        yield Candidate("sylvester", name, rows(passes), measured(program), artefact(work, program), not passes)


def rounded(program: Program, passes: tuple[Pass, ...]) -> Program:
    changed = program.clone()
    for step in passes:
        step.requires(changed)
        step.run(changed)
    changed.sweep()
    return changed


def rows(passes: tuple[Pass, ...]) -> str:
    bits = [step.activations or 16 for step in passes if isinstance(step, Quantize)]
    return f"int{bits[-1]}, whole rows" if bits else "float32"


def measured(program: Program) -> Stored:
    """Bytes of matrices and their scales, without the filling of the last panel."""
    sizes = {"linears": 0, "head": 0}
    for key, tensor in program.weights.items():
        if tensor.ndim == 2:
            scales = key.endswith("scales")
            size = WIDTH_OF_SCALES[tensor.shape[1] == 1] if scales else tensor.element_size()
            sizes["head" if any(name in key for name in HEAD) else "linears"] += tensor.numel() * size
    return Stored(**sizes)


def artefact(work: Work, program: Program) -> Logits:
    """Logits of the compiled program; it is built at the first call."""
    compiled: list[sv.Compiled] = []

    def call(ids: Ids) -> NDArray[np.float32]:
        if not compiled:
            compiled.append(sv.compile(program, threads=work.threads))
        return np.asarray(compiled[0](input_ids=ids[None]).logits)[0]

    return call


def in_torch(program: Program) -> Logits:
    """Logits of the program as PyTorch runs it."""
    return lambda ids: run(program, {"input_ids": torch.from_numpy(ids[None])})["logits"][0].numpy()
