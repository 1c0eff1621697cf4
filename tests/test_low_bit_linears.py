"""Low-bit linear layers in programs: which run as one, what is fused into them, tables they share, what is refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.codegen.compile import compile_program, plans
from sylvester.codegen.epilogue import fuse_epilogues
from sylvester.codegen.isa import AVX2
from sylvester.codegen.lazy import Linear
from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.ops import Op
from sylvester.compiler.program import Program
from sylvester.compiler.quantization import round_int3, round_int4, round_int8
from tests.programs import program

rms_norm, swiglu = torch.ops.sylvester.rms_norm, torch.ops.sylvester.swiglu
TARGET = sv.Target("cpu", threads=2, isas=("avx2",))
FORMS = {
    "q8": (dialect.linear_w8, dialect.dequantize_w8, round_int8),
    "q4": (dialect.linear_w4, dialect.dequantize_w4, round_int4),
    "q3": (dialect.linear_w3, dialect.dequantize_w3, round_int3),
}


def rounded(name: str, group: int = 32, **rows: int) -> dict[str, Tensor]:
    """Random weights [rows, 104] and their scales, by name and name + "s"."""
    made = {}
    for key, n in rows.items():
        made[key], made[f"{key}s"] = FORMS[name][2](torch.randn(n, 104) / 10, group)
    return made


def linears(traced: Program) -> list[Linear]:
    return [step for step in fuse_epilogues(plans(traced)["forward"]) if isinstance(step, Linear)]


def ran(traced: Program, *inputs: Tensor) -> list[Tensor]:
    with sv.compile(traced, target=TARGET) as compiled:
        result = compiled(*inputs)
    return [result] if isinstance(result, Tensor) else list(result)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", FORMS)
def test_layers_run_as_one_when_their_rows_are_rounded_alike(name: str) -> None:
    op = FORMS[name][0]

    def model(x: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        step, other = w[14:]
        alike = op(x, w[0], w[1]), op(x, w[2], w[3], None, 8), op(x, w[4], w[5], None, 16), op(x, w[6], w[7], None, 4)
        return *alike, op(x, *w[8:10], None, 8, step), op(x, *w[10:12], None, 8, step), op(x, *w[12:14], None, 8, other)

    made = rounded(name, a=9, b=33, c=7, d=5, e=32, f=3, g=4)
    steps = {"step": torch.tensor([0.02]), "other": torch.tensor([0.5])}
    traced, x = program(model, torch.randn(6, 104), weights=made | steps), torch.randn(6, 104)

    found = {(str(step.format), step.layers) for step in linears(traced)}
    form = f"{name}/32"
    alone = {(f"{form} a16", 1), (f"{form} a4", 1), (f"{form} static", 1)}
    assert found == {(form, 2), (f"{form} static", 2), *alone}
    kernels = re.findall(r"\bvoid sv_linear_(\w+)_[0-9a-f]{10}\(", compile_program(traced).unit.text(AVX2))
    assert sorted(kernels) == [name, f"{name}_a16", f"{name}_a4", f"{name}_static"]
    for y, expected in zip(ran(traced, x), model(x.double(), *made.values(), *steps.values()), strict=True):
        assert relative(y, expected) <= 2e-6


@pytest.mark.parametrize("name", ["q4", "q3"])
def test_one_scale_of_a_row_beside_scales_of_groups(name: str) -> None:
    """Both run in groups of 128, as one step."""
    op, _, rounding = FORMS[name]
    made = {}
    for key, n in (("a", 33), ("b", 7), ("c", 40)):
        made[key], made[f"{key}s"] = rounding(torch.randn(n, 200) / 10, 128)
    made["bs"] = made["bs"][:, :1].clone()

    def model(x: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
        return tuple(op(x, *w[i : i + 2]) for i in (0, 2, 4))

    traced, x = program(model, torch.randn(6, 200), weights=made), torch.randn(6, 200)

    assert [step.layers for step in linears(traced)] == [3]
    for y, expected in zip(ran(traced, x), model(x.double(), *made.values()), strict=True):
        assert relative(y, expected) <= 2e-6


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_norms_gates_and_residuals_are_fused_into_rows_of_sixteen_bits(name: str, rows: int) -> None:
    op, widen, _ = FORMS[name]

    def model(x: Tensor, g: Tensor, *w: Tensor) -> Tensor:
        h = rms_norm(x, g, 1e-5)
        y = swiglu(op(h, w[0], w[1], None, 16), op(h, w[2], w[3], None, 16))
        return x + op(y, w[4], w[5], w[6], 16)

    made = {"g": torch.rand(104) + 0.5} | rounded(name, 64, gate=104, up=104, down=104) | {"bias": torch.randn(104)}
    traced, x = program(model, torch.randn(4, 104), weights=made), torch.randn(rows, 104)

    first, second = linears(traced)
    assert len(first.outputs) == 2
    assert first.norm
    assert first.epilogue
    assert second.epilogue
    gate, up, down = (widen(made[key], made[f"{key}s"]).double() for key in ("gate", "up", "down"))
    h = rms_norm(x.double(), made["g"].double(), 1e-5)
    expected = x.double() + F.linear(F.silu(h @ gate.T) * (h @ up.T), down, made["bias"].double())
    assert relative(ran(traced, x)[0], expected) <= 1e-4


@pytest.mark.parametrize(("name", "group"), [("q8", 0), ("q8", 32), ("q4", 64), ("q3", 32), ("q3", 128)])
@pytest.mark.parametrize("shared", [True, False])
def test_tables_are_read_from_the_panels_of_a_layer_or_as_they_are(name: str, group: int, shared: bool) -> None:
    op, widen, _ = FORMS[name]

    def model(ids: Tensor, table: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        x = F.embedding(ids, widen(table, scales))
        return x, op(x, table, scales, None, 4) if shared else x * 2

    made = rounded(name, group, table=45)
    traced, ids = program(model, torch.randint(45, (7,)), weights=made, axes=lambda _: (0,)), torch.randint(45, (7,))

    x, y = ran(traced, ids)
    expected = model(ids, *made.values())
    assert x.equal(expected[0])
    assert relative(y, expected[1]) <= 2e-6


def computed_step(op: Op, x: Tensor, w: Tensor, s: Tensor, step: Tensor) -> Tensor:
    return op(x, w, s, None, 8, x.abs().amax().reshape(1) / 127)


def computed_weight(op: Op, x: Tensor, w: Tensor, s: Tensor, step: Tensor) -> Tensor:
    return op(x, w + 1, s, None, 8, step)


@pytest.mark.parametrize("model", [computed_step, computed_weight])
@pytest.mark.parametrize("name", FORMS)
def test_parameters_that_are_computed_are_refused(name: str, model: object) -> None:
    op, made = FORMS[name][0], rounded(name, w=4) | {"step": torch.ones(1)}
    traced = program(lambda *given: model(op, *given), torch.randn(3, 104), weights=made)  # type: ignore[operator]

    with pytest.raises(Unsupported, match=r"needs a stored weight, .* and a stored step \[1\]"):
        plans(traced)
