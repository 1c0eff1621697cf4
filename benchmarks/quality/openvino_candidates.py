"""OpenVINO: weights compressed by NNCF, from the weights alone and with the texts to fit to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.candidates import Candidate, Ids, Logits, Stored, Work
from benchmarks.suite.llama import Llama
from benchmarks.suite.openvino_models import repeated

Mode = nncf.CompressWeightsMode
ROWS = {None: "int8, groups of 32", 0: "float32"}
"""By DYNAMIC_QUANTIZATION_GROUP_SIZE; the plugin's own choice without it."""
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
FITTED = {"scales": {"scale_estimation": True}, "awq, scales": {"awq": True, "scale_estimation": True}}
SYMMETRIC, ASYMMETRIC = "symmetric", "zero points"


class Every(nn.Module):
    """Logits of all positions [batch, tokens, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.llama = Llama(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = q.shape[1]
            return F.scaled_dot_product_attention(q, repeated(k, heads), repeated(v, heads), is_causal=True)

        hidden = self.llama.hidden(input_ids, torch.arange(input_ids.shape[1])[None], attend)
        return self.llama.head(hidden)


def candidates(work: Work) -> Iterator[Candidate]:
    nncf.set_log_level(logging.ERROR)
    plain = work.folder / "openvino.xml"
    with torch.inference_mode():
        example = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
        model = ov.convert_model(Every(work.checkpoint.load()), example_input=example)
    model.reshape({model.inputs[0]: [1, -1]})
    ov.save_model(model, plain, compress_to_fp16=False)
    yield candidate(work, plain, "fp32", 0, exact=True)
    for name, options in choices(work):
        path = work.folder / f"{name.replace(', ', '-').replace(' ', '-')}.xml"
        with redirect_stdout(sys.stderr):
            compressed = nncf.compress_weights(ov.Core().read_model(plain), **options)
        ov.save_model(compressed, path, compress_to_fp16=False)
        for group in ROWS:
            yield candidate(work, path, name, group)


def choices(work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options of `compress_weights` by the name of a row; "default head" keeps head and embedding at 8 bits."""
    yield f"int8 {SYMMETRIC}", {"mode": Mode.INT8_SYM}
    yield f"int8 {ASYMMETRIC}", {"mode": Mode.INT8_ASYM}
    data = {"dataset": nncf.Dataset([{"input_ids": ids[None]} for ids in work.fit]), "subset_size": len(work.fit)}
    for kind, mode in ((SYMMETRIC, Mode.INT4_SYM), (ASYMMETRIC, Mode.INT4_ASYM)):
        for group in (32, 64):
            options = {"mode": mode, "group_size": group, "ratio": 1.0, "all_layers": True}
            yield f"int4/{group} {kind}", options
            for fitted, more in FITTED.items() if work.fit else ():
                yield f"int4/{group} {kind}, {fitted}", options | more | data
        yield f"int4/32 {kind}, default head", {"mode": mode, "group_size": 32, "ratio": 1.0}


def candidate(work: Work, path: Path, name: str, group: int | None, exact: bool = False) -> Candidate:
    return Candidate("openvino", name, ROWS[group], measured(work, path), logits(work, path, group), exact)


def measured(work: Work, path: Path) -> Stored:
    """Constants that have a matrix's number of rows as their first axis."""
    vocabulary = work.checkpoint.config.vocab_size
    rows = {tensor.shape[0] for tensor in work.checkpoint.tensors().values() if tensor.ndim == 2}
    sizes = {"linears": 0, "head": 0}
    for node in ov.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1 and node.shape[0] in rows:
            sizes["head" if node.shape[0] == vocabulary else "linears"] += node.get_byte_size()
    return Stored(**sizes)


def logits(work: Work, path: Path, group: int | None) -> Logits:
    current: list[Any] = []
    options = {"INFERENCE_NUM_THREADS": work.threads, "NUM_STREAMS": 1, **EXACT}
    if group is not None:
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group

    def call(ids: Ids) -> NDArray[np.float32]:
        if not current:
            current.append(ov.Core().compile_model(path, "CPU", options).create_infer_request())
        return np.array(current[0].infer({0: ids[None]})[0][0])

    return call
