"""Graphs of a bundle as ONNX, in standard ops and in those of onnxruntime, run in onnxruntime."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from sylvester.backends.onnx.backend import Onnx
from sylvester.backends.onnx.runtime import Graphs
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import Program, binding
from sylvester.compiler.progress import silent
from sylvester.compiler.target import Target
from sylvester.compiler.weights import ParameterStore
from tests.fuzz.native import Bundle, Failures, require
from tests.fuzz.rounding import SHARES
from tests.fuzz.values import Expected, expected

aten, dialect = torch.ops.aten, torch.ops.sylvester
KINDS = ("standard", "ort")
ROUNDED = {target: 4e-2 for target in (dialect.linear_w8.default, dialect.linear_w4.default, dialect.linear_w3.default)}
"""Layers whose rows onnxruntime rounds otherwise than the program."""
EXTREMA = {
    aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.adaptive_max_pool2d.default,
}  # fmt: skip
"""Ops that pass over NaN in onnxruntime."""


def check_onnx(bundle: Bundle, kind: str, counts: Counter[str]) -> Failures:
    """Every graph that has an ONNX form agrees with float64."""
    failures: Failures = {}
    for name in bundle.cases:
        try:
            _check(bundle, name, kind, counts)
        except Unsupported:
            counts[f"onnx {kind}: no form"] += 1
        except Exception as error:  # also what onnxruntime raises
            failures[name] = error
    return failures


def _check(bundle: Bundle, name: str, kind: str, counts: Counter[str]) -> None:
    program = alone(bundle, name)
    if _meets_nan(bundle, name):
        counts[f"onnx {kind}: a maximum over NaN"] += 1
        return
    with TemporaryDirectory(prefix="sylvester-fuzz-") as made, _unchecked():
        folder, target = Path(made), Target("onnx", options={"ops": kind})
        graphs = Graphs(folder, Onnx().build(program, target, folder, silent), threads=1)
        counts[f"onnx {kind}: run"] += 1
        for turn in bundle.cases[name].turns:
            inputs = bundle.cases[name].inputs(turn)
            found = graphs.run(name, {key: t.numpy() for key, t in inputs.items()})
            require(found, _wanted(bundle, name, program, turn, inputs), f"onnx {kind}, turn {turn}")
        graphs.close()


def alone(bundle: Bundle, name: str) -> Program:
    """The program of one entry of the bundle."""
    entry = bundle.program.entries[name]
    weights = ParameterStore()
    for node in entry.placeholders("weight"):
        weights[binding(node).key] = bundle.program.weights[binding(node).key]
    return Program(weights, {name: entry})


def _wanted(
    bundle: Bundle, name: str, program: Program, turn: int, inputs: Mapping[str, Tensor]
) -> dict[str, Expected]:
    rounds = {node.target for node in program.entries[name].calls()} & ROUNDED.keys()
    return expected(program, inputs, name, {**SHARES, **ROUNDED}) if rounds else bundle.wanted[name][turn]


def _meets_nan(bundle: Bundle, name: str) -> bool:
    """Whether a NaN is about, and a maximum or minimum that may meet it."""
    if not {node.target for node in bundle.program.entries[name].calls()} & EXTREMA:
        return False
    graph = bundle.cases[name].graph
    values = [x for turn in bundle.cases[name].turns for x in graph.run(graph.tensors(turn))]
    return any(isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()) for x in values)


@contextmanager
def _unchecked() -> Iterator[None]:
    """Without the comparison of graphs that compiling makes, whose tolerances are wider."""
    before = os.environ.get(knobs.CHECK.name)
    os.environ[knobs.CHECK.name] = "0"
    try:
        yield
    finally:
        os.environ.pop(knobs.CHECK.name)
        if before is not None:
            os.environ[knobs.CHECK.name] = before
