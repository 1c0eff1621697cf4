"""Every op with an ONNX form agrees with float64 in onnxruntime, in standard ops and in onnxruntime's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sylvester.backends.onnx.backend import Onnx
from sylvester.backends.onnx.builder import TRANSLATIONS
from sylvester.backends.onnx.runtime import Graphs
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.progress import silent
from sylvester.compiler.target import Target
from tests import aten_program
from tests.fuzz.onnx import EXTREMA
from tests.sampling import SIZES, Case
from tests.test_backends import ALL, DIALECT, KEPT_WIDER, RELATIVE, check, drawn, inputs

aten, dialect = torch.ops.aten, torch.ops.sylvester
WITHOUT_FORM = {
    "aten.atan2.default", "aten.diagonal.default", "aten.eye.default", "aten.eye.m", "aten.instance_norm.default",
    "aten.linspace.default", "aten.native_layer_norm.default", "aten.pixel_unshuffle.default",
    "aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.replication_pad1d.default",
    "aten.replication_pad2d.default", "aten.unfold.default", "aten.upsample_bilinear2d.vec",
    "aten.upsample_linear1d.vec", "aten.upsample_nearest1d.default", "aten.upsample_nearest1d.vec",
    "aten.upsample_nearest2d.default", "aten.upsample_nearest2d.vec", "sylvester.attention_q.default",
    "sylvester.kv_update_q.default",
}  # fmt: skip
SOMETIMES = {aten.avg_pool2d.default, aten.scaled_dot_product_attention.default}
"""Ops of which some calls have no ONNX form."""
ROUNDED = {dialect.linear_w8.default, dialect.linear_w4.default, dialect.linear_w3.default}
"""Layers whose rows onnxruntime rounds otherwise: their error is relative to the largest value."""
OFTEN = 2e-2
OLD = {
    dialect.attention.default, dialect.kv_update.default, dialect.rms_norm.default, dialect.rope.default,
    aten.gelu.default, aten.scaled_dot_product_attention.default, aten.rms_norm.default, dialect.geglu.default,
}  # fmt: skip
"""Ops that are written out below the opset that has them."""
KINDS = {"standard": {"ops": "standard"}, "ort": {"ops": "ort"}, "opset 18": {"opset": 18}, "opset 23": {"opset": 23}}


def has_form(case: Case) -> bool:
    if case.target not in SOMETIMES:
        return case.target in TRANSLATIONS
    if case.target is aten.avg_pool2d.default:
        return len(case.args) < 5 or (case.args[4:6] != (True, True) and len(case.args) < 7)
    return len(case.samples[0].shape) == 4


def meets_nan(case: Case) -> bool:
    return case.target in EXTREMA and any(sample.kind == "edges" for sample in case.samples)


def cases(kind: str) -> dict[str, Case]:
    known = {name: case for name, case in ALL.items() if has_form(case) and not meets_nan(case)}
    if kind == "standard":
        return known
    if kind == "ort":
        return {name: case for name, case in known.items() if name in DIALECT or case.target is aten.silu.default}
    return {name: case for name, case in known.items() if case.target in OLD}


@pytest.mark.parametrize("kind", KINDS)
def test_ops_agree_with_float64(kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(knobs.CHECK.name, "0")
    chosen = cases(kind)
    made = Onnx().build(aten_program.program(chosen.items()), Target("onnx", options=KINDS[kind]), tmp_path, silent)
    graphs = Graphs(tmp_path, made, threads=1)
    for name, case in chosen.items():
        weights = case.tensors(SIZES[0])
        for sizes in SIZES[::2] if case.symbolic else SIZES[:1]:
            tensors = drawn(case, sizes, weights)
            expected = case.call(tensors, sizes, wide=True)
            found = [torch.from_numpy(np.array(a)) for a in graphs.run(name, inputs(case, tensors)).values()]
            if case.target in ROUNDED:
                assert float((found[0] - expected[0]).abs().max()) <= OFTEN * float(expected[0].abs().max()), case
            else:
                check(found, expected, (kind, sizes, case), KEPT_WIDER.get(case.target, RELATIVE))
        graphs.close()


def refused() -> Iterator[Case]:
    return (case for case in ALL.values() if not has_form(case))


def test_ops_without_form_are_refused_by_name(tmp_path) -> None:
    named = set()
    for case in refused():
        with pytest.raises(Unsupported, match=r"has no (ONNX )?form|no ONNX form for"):
            Onnx().build(aten_program.program([("forward", case)]), Target("onnx"), tmp_path, silent)
        named.add(str(case.target))

    assert named - {str(target) for target in SOMETIMES} == WITHOUT_FORM
