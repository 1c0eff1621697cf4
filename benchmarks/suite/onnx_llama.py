"""Llama as an ONNX file in the form of onnxruntime's model builder: GroupQueryAttention over shared cache buffers.

Precisions: fp32; int8 (dynamic activations, a scale per output); int4 (MatMulNBits, groups of 32, accuracy level 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.suite.shapes import Checkpoint
from benchmarks.suite.sizes import CAPACITY

MICROSOFT = "com.microsoft"
GROUP = 32
Array = NDArray[Any]


@dataclass
class Graph:
    """Nodes and initializers under way; `matmul` writes a linear layer at the chosen precision."""

    precision: str
    nodes: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    quantized: set[str] = field(default_factory=set)

    def add(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, name=f"{op}_{outputs[0]}", **attributes))
        return outputs[0]

    def constant(self, name: str, array: Array) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def matmul(self, x: str, name: str, weight: Array) -> str:
        """x W^T for a weight [outputs, inputs]."""
        if self.precision == "fp32":
            return self.add("MatMul", [x, self.constant(f"{name}.w", weight.T)], [name])
        return (self.matmul_int8 if self.precision == "int8" else self.matmul_int4)(x, name, weight)

    def matmul_int8(self, x: str, name: str, weight: Array) -> str:
        scale = np.abs(weight).max(1) / 127
        whole = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
        if not self.quantized:
            self.constant("zero", np.zeros((), np.int8))
        if x not in self.quantized:
            self.quantized.add(x)
            self.add("DynamicQuantizeLinear", [x], [f"{x}.q", f"{x}.scale", f"{x}.zero"])
        weights = self.constant(f"{name}.w", whole.T)
        sums = self.add("MatMulInteger", [f"{x}.q", weights, f"{x}.zero", "zero"], [f"{name}.sums"])
        wide = self.add("Cast", [sums], [f"{name}.wide"], to=TensorProto.FLOAT)
        scales = self.add(
            "Mul", [f"{x}.scale", self.constant(f"{name}.s", scale.astype(np.float32))], [f"{name}.scales"]
        )
        return self.add("Mul", [wide, scales], [name])

    def matmul_int4(self, x: str, name: str, weight: Array) -> str:
        outputs, depth = weight.shape
        groups = weight.reshape(outputs, depth // GROUP, GROUP)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
        scale = np.where(largest == 0, 1, largest / -8)
        whole = (np.clip(np.rint(groups / scale), -8, 7) + 8).astype(np.uint8)
        weights = self.constant(f"{name}.w", whole[..., 0::2] | whole[..., 1::2] << 4)
        scales = self.constant(f"{name}.s", scale.astype(np.float32).ravel())
        sizes = {"K": depth, "N": outputs, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        return self.add("MatMulNBits", [x, weights, scales], [name], MICROSOFT, **sizes)


def write(path: Path, checkpoint: Checkpoint, precision: str, every: bool = False) -> None:
    """Logits of the last position, or with `every` of all of them, by a head that shares nothing with the embedding."""
    config, graph = checkpoint.config, Graph(precision)
    weights = {name: tensor.float().numpy() for name, tensor in checkpoint.tensors().items()}
    width = config.hidden_size // config.num_attention_heads
    rotation_tables(graph, width, config.rope_parameters["rope_theta"])
    embedding = graph.constant("embedding", weights["model.embed_tokens.weight"])
    x = graph.add("Gather", [embedding, "input_ids"], ["x"])
    first = graph.constant("norm.first", weights["model.layers.0.input_layernorm.weight"])
    kind = {"axis": -1, "epsilon": config.rms_norm_eps}
    h = graph.add("SimplifiedLayerNormalization", [x, first], ["h"], stash_type=1, **kind)
    for index in range(config.num_hidden_layers):
        x, h = block(graph, weights, config, index, x, h)
    if every:
        graph.matmul(h, "logits", weights["model.embed_tokens.weight"])
    else:
        last = graph.add("Gather", [h, graph.constant("last", np.array([-1]))], ["hidden.last"], axis=1)
        head(graph, last, weights["model.embed_tokens.weight"])
    save(graph, config, width, path)


def rotation_tables(graph: Graph, width: int, theta: float) -> None:
    frequencies = (theta ** -(np.arange(0, width, 2, dtype=np.float32) / width)).astype(np.float32)
    angles = np.outer(np.arange(CAPACITY, dtype=np.float32), frequencies)
    graph.constant("cos", np.cos(angles))
    graph.constant("sin", np.sin(angles))


def block(graph: Graph, weights: dict[str, Array], config: Any, index: int, x: str, h: str) -> tuple[str, str]:
    """One layer; returns the residual stream and its normed copy for the next."""
    place, name = f"model.layers.{index}.", f"layer{index}."
    take = {key: weights[place + key + ".weight"] for key in LINEARS}
    packed = np.concatenate([take[f"self_attn.{part}_proj"] for part in "qkv"])
    past = [f"past.{index}.key", f"past.{index}.value"]
    attention = graph.add(
        "GroupQueryAttention",
        [graph.matmul(h, name + "qkv", packed), "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
        [name + "attention", f"present.{index}.key", f"present.{index}.value"],
        MICROSOFT, num_heads=config.num_attention_heads, kv_num_heads=config.num_key_value_heads, do_rotary=1,
    )  # fmt: skip
    mixed = graph.matmul(attention, name + "o", take["self_attn.o_proj"])
    x, h = skip_norm(graph, config, name + "middle", x, mixed, weights[place + "post_attention_layernorm.weight"])
    gate, up = graph.matmul(h, name + "gate", take["mlp.gate_proj"]), graph.matmul(h, name + "up", take["mlp.up_proj"])
    silu = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], [name + "sigmoid"])], [name + "silu"])
    down = graph.matmul(graph.add("Mul", [silu, up], [name + "product"]), name + "down", take["mlp.down_proj"])
    final = index == config.num_hidden_layers - 1
    following = "model.norm.weight" if final else f"model.layers.{index + 1}.input_layernorm.weight"
    return skip_norm(graph, config, name + "end", x, down, weights[following])


LINEARS = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


def skip_norm(graph: Graph, config: Any, name: str, x: str, added: str, weight: Array) -> tuple[str, str]:
    inputs, outputs = [x, added, graph.constant(name + ".w", weight)], [name + ".normed", "", "", name + ".sum"]
    graph.add("SkipSimplifiedLayerNormalization", inputs, outputs, MICROSOFT, epsilon=config.rms_norm_eps)
    return outputs[3], outputs[0]


def head(graph: Graph, last: str, weight: Array) -> None:
    """In fp32 the table of the embedding is used again; lower precisions have a copy of their own."""
    if graph.precision != "fp32":
        graph.matmul(last, "logits", weight)
        return
    flat = graph.add("Reshape", [last, graph.constant("flat", np.array([-1, weight.shape[1]]))], ["hidden.flat"])
    graph.add("Gemm", [flat, "embedding"], ["logits"], transB=1)


def save(graph: Graph, config: Any, width: int, path: Path) -> None:
    def value(name: str, kind: int, shape: list[Any] | None) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = ["batch", config.num_key_value_heads, "length", width]
    pairs = [f"{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_sequence_length", TensorProto.INT32, []),
        *(value(f"past.{pair}", TensorProto.FLOAT, cache) for pair in pairs),
    ]
    outputs = [value("logits", TensorProto.FLOAT, None)]
    outputs += [value(f"present.{pair}", TensorProto.FLOAT, cache) for pair in pairs]
    made = helper.make_graph(graph.nodes, "llama", inputs, outputs, graph.tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
