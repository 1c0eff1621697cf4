"""onnxruntime: MatMulNBits and GatherBlockQuantized in blocks of 32, as its own quantiser makes them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from benchmarks.quality.candidates import Candidate, Ids, Logits, Stored, Work
from benchmarks.suite import onnx_llama
from benchmarks.suite.onnx_engine import session

BLOCK = 32
LEVELS = {0: "float32", 4: "int8, blocks of 32"}
"""The accuracy level of MatMulNBits says how it computes."""


def candidates(work: Work) -> Iterator[Candidate]:
    logging.disable(logging.INFO)
    plain = work.folder / "fp32.onnx"
    onnx_llama.write(plain, work.checkpoint, "fp32", every=True)
    yield candidate(work, plain, "fp32", "float32", exact=True)
    for bits, symmetric, level in itertools.product((4, 8), (True, False), LEVELS):
        name = f"int{bits} {'symmetric' if symmetric else 'zero points'}"
        path = work.folder / f"{name.replace(' ', '-')}-{level}.onnx"
        quantize(plain, path, bits, symmetric, level)
        yield candidate(work, path, name, LEVELS[level])


def quantize(source: Path, path: Path, bits: int, symmetric: bool, level: int) -> None:
    """The embedding too where its kernel exists, which is for 4 bits."""
    kinds = ("MatMul", "Gather") if bits == 4 else ("MatMul",)
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=symmetric, accuracy_level=level, op_types_to_quantize=kinds, bits=bits
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def candidate(work: Work, path: Path, name: str, rows: str, exact: bool = False) -> Candidate:
    return Candidate("onnxruntime", name, rows, measured(path), logits(work, path), exact)


def measured(path: Path) -> Stored:
    """Bytes of the constants of each matrix product and of the table."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
    found = {"linears": 0, "head": 0, "table": 0}
    for node in graph.node:
        size = sum(sizes.get(name, 0) for name in node.input)
        if node.op_type in ("MatMul", "MatMulNBits"):
            found["head" if node.output[0] == "logits" else "linears"] += size
        elif node.op_type in ("Gather", "GatherBlockQuantized"):
            found["table"] += size
    return Stored(**found)


def logits(work: Work, path: Path) -> Logits:
    current: list[ort.InferenceSession] = []
    config = work.checkpoint.config
    shape = (1, config.num_key_value_heads, 0, config.hidden_size // config.num_attention_heads)

    def call(ids: Ids) -> NDArray[np.float32]:
        if not current:
            current.append(session(path, work.threads))
        past = {given.name: np.zeros(shape, np.float32) for given in current[0].get_inputs() if "past." in given.name}
        count = np.array(len(ids), np.int32)
        named = {"input_ids": ids[None], "seqlens_k": count[None] - 1, "total_sequence_length": count}
        found: Any = current[0].run(["logits"], named | past)[0]
        return np.asarray(found)[0]

    return call
