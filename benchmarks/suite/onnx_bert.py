"""BERT as ONNX files: exported, fused by onnxruntime's transformer optimizer, and with dynamic int8."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suite.shapes import Checkpoint
from benchmarks.suite.sizes import BERT, SEQUENCE

AXES = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask", "hidden")}


class Hidden(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def write(path: Path, checkpoint: Checkpoint, precision: str) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    raw = path.with_suffix(".raw.onnx")
    export(raw, checkpoint)
    heads, width = BERT["num_attention_heads"], BERT["hidden_size"]
    fused = optimizer.optimize_model(
        str(raw), "bert", heads, width, optimization_options=FusionOptions("bert"), opt_level=0
    )
    raw.unlink()
    if precision == "fp32":
        fused.save_model_to_file(str(path))
        return
    plain = path.with_suffix(".fp32.onnx")
    fused.save_model_to_file(str(plain))
    quantize(plain, path)
    plain.unlink()


def export(path: Path, checkpoint: Checkpoint) -> None:
    ids = torch.ones(1, SEQUENCE, dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden(checkpoint.load(attention="eager")), (ids, ids), str(path), input_names=names,
            output_names=["hidden"], dynamic_axes=AXES, opset_version=17, dynamo=False,
        )  # fmt: skip


def quantize(source: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"MatMulConstBOnly": True, "DefaultTensorType": 1}
    quantize_dynamic(
        source, path, op_types_to_quantize=["MatMul", "Attention"], per_channel=True, weight_type=QuantType.QInt8,
        extra_options=options,
    )  # fmt: skip
