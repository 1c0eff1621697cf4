"""OpenVINO models: a Llama with its caches as state, as optimum-intel exports it, and the encoder of one fixed size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.llama import Llama
from benchmarks.suite.shapes import Checkpoint, token_ids
from benchmarks.suite.sizes import SEQUENCE

SAMPLES = 32


class Growing(nn.Module):
    """Functional caches: the past goes in, the longer past comes out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.llama = Llama(model)

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        present: list[Tensor] = []

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = torch.cat((past[index][0], k), 2), torch.cat((past[index][1], v), 2)
            present.extend((k, v))
            # OpenVINO aligns a causal mask with the last key, which is what a cache needs.
            return F.scaled_dot_product_attention(q, repeated(k, q.shape[1]), repeated(v, q.shape[1]), is_causal=True)

        logits = self.llama.last_logits(input_ids, position_ids, attend)
        return logits, *present


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key-value heads [b, shared, s, w] beside each query head, in the form OpenVINO recognises."""
    batch, shared, length, width = x.shape
    if shared == heads:
        return x
    return x[:, :, None].expand(batch, shared, heads // shared, length, width).reshape(batch, heads, length, width)


def write_llama(path: Path, checkpoint: Checkpoint) -> None:
    torch.set_grad_enabled(False)
    module = Growing(checkpoint.load())
    layers, shared, width = module.llama.layers, module.llama.shared, module.llama.width
    past = [tuple(torch.zeros(1, shared, 3, width) for _ in range(2)) for _ in range(layers)]
    example = {"input_ids": torch.ones(1, 2, dtype=torch.long), "position_ids": torch.tensor([[3, 4]]), "past": past}
    model = ov.convert_model(module, example_input=example)
    name_ports(model, layers)
    sizes = {f"past.{i}": ov.PartialShape([1, shared, -1, width]) for i in range(2 * layers)}
    model.reshape({name: ov.PartialShape([1, -1]) for name in ("input_ids", "position_ids")} | sizes)
    keep_caches(model, 2 * layers, shared, width)
    ov.save_model(model, path, compress_to_fp16=False)


def name_ports(model: ov.Model, layers: int) -> None:
    names = ["input_ids", "position_ids", *(f"past.{i}" for i in range(2 * layers))]
    for port, name in zip(model.inputs, names, strict=True):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits", *(f"present.{i}" for i in range(2 * layers))], strict=True):
        port.get_tensor().set_names({name})


def keep_caches(model: ov.Model, count: int, shared: int, width: int) -> None:
    """Past and present become state, reordered by `beam_idx` (which the fused attention looks for), empty at first."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = ops.parameter(name="beam_idx", dtype=ov.Type.i32, shape=ov.PartialShape([1]))
    beam.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beam])
    for index in range(count):
        given = model.input(f"past.{index}").get_node()
        readers = given.output(0).get_target_inputs()
        chosen = ops.gather(given, beam, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {f"past.{i}": f"present.{i}" for i in range(count)})
    shape = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0], dtype=np.int64), ops.constant(0, dtype=np.int64))
    rest = [ops.constant(np.array([size], np.int64)) for size in (shared, 0, width)]
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            blank = ops.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(blank, ops.concat([batch, *rest], axis=0))])
    model.validate_nodes_and_infer_types()


def write_compressed(path: Path, source: Path, precision: str) -> None:
    """Weights only; the plugin quantises the activations by itself where that is faster."""
    import nncf

    model = ov.Core().read_model(source)
    if precision == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0, all_layers=True)
    ov.save_model(model, path, compress_to_fp16=False)


def write_bert(path: Path, checkpoint: Checkpoint) -> None:
    from benchmarks.suite.onnx_bert import Hidden

    ids = torch.ones(1, SEQUENCE, dtype=torch.long)
    with torch.inference_mode():
        example = {"input_ids": ids, "attention_mask": ids}
        model = ov.convert_model(Hidden(checkpoint.load()), example_input=example)
    for port, name in zip(model.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    ov.save_model(model, path, compress_to_fp16=False)


def write_calibrated(path: Path, source: Path) -> None:
    """int8 weights and activations, their ranges from random tokens."""
    import nncf

    ids = token_ids("B", SAMPLES, SEQUENCE).numpy()
    data = nncf.Dataset([{"input_ids": row[None], "attention_mask": np.ones_like(row)[None]} for row in ids])
    kind = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(ov.Core().read_model(source), data, model_type=kind, subset_size=SAMPLES)
    ov.save_model(model, path, compress_to_fp16=False)
