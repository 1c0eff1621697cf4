"""Linear layers that run as one, norms in their packing, elementwise work in their epilogues, and when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sylvester as sv
from sylvester.codegen.compile import compile_program, plans
from sylvester.codegen.epilogue import fuse_epilogues
from sylvester.codegen.lazy import Linear
from sylvester.compiler.program import Program
from tests.programs import program

rms_norm, swiglu, geglu = torch.ops.sylvester.rms_norm, torch.ops.sylvester.swiglu, torch.ops.sylvester.geglu
rotated = torch.ops.sylvester.hadamard
X = torch.randn(3, 5, 40)
TARGET = sv.Target("cpu", threads=2, isas=("avx2",))


def weights(**rows: int) -> dict[str, Tensor]:
    """Random weights [rows, 40] by name."""
    return {name: torch.randn(n, 40) / 6 for name, n in rows.items()}


def linears(traced: Program, entry: str = "forward") -> list[Linear]:
    return [step for step in fuse_epilogues(plans(traced)[entry]) if isinstance(step, Linear)]


def ran(traced: Program, *inputs: Tensor) -> list[Tensor]:
    """What the compiled program gives."""
    with sv.compile(traced, target=TARGET) as compiled:
        result = compiled(*inputs)
    return [result] if isinstance(result, Tensor) else list(result)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-6 * expected.abs().max())


def test_layers_over_one_input_are_one_step_with_views_of_its_result() -> None:
    def model(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(x, q), F.linear(x, k), F.linear(x, v)

    made = weights(q=40, k=7, v=33)
    traced = program(model, X, weights=made)

    (step,) = linears(traced)
    assert (step.layers, step.n.constant, len(step.outputs)) == (3, 80, 1)
    for found, key in zip(ran(traced, X), "qkv", strict=True):
        assert close(found.double(), X.double() @ made[key].double().T)


def test_biases_of_joined_layers_stand_end_to_end_with_zeros_between() -> None:
    def model(x: Tensor, q: Tensor, k: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, q), F.linear(x, k, b)

    made = weights(q=35, k=9) | {"b": torch.randn(9)}
    traced = program(model, X, weights=made)

    assert linears(traced)[0].layers == 2
    assert "+b@35+9" in {layout.name for layout in compile_program(traced).weights["forward"]}
    plain, shifted = ran(traced, X)
    assert close(plain.double(), X.double() @ made["q"].double().T)
    assert close(shifted.double(), X.double() @ made["k"].double().T + made["b"].double())


@pytest.mark.parametrize("gate", [swiglu, lambda g, u: geglu(g, u, "tanh")], ids=["swiglu", "geglu"])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_gate_and_up_are_interleaved_and_the_gate_is_an_epilogue(gate: Callable[..., Tensor], rows: int) -> None:
    def model(x: Tensor, g: Tensor, u: Tensor) -> Tensor:
        return gate(F.linear(x, g), F.linear(x, u))

    made, x = weights(g=45, u=45), torch.randn(rows, 40)
    traced = program(model, X[0], weights=made)

    (step,) = linears(traced)
    assert len(step.outputs) == 2
    assert step.epilogue is not None
    expected = gate(x.double() @ made["g"].double().T, x.double() @ made["u"].double().T)
    assert close(ran(traced, x)[0].double(), expected)


def test_layers_that_share_a_weight_with_others_are_left_apart() -> None:
    def model(x: Tensor, q: Tensor, k: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(x, q), F.linear(x, k), F.linear(y, q)

    traced = program(lambda x, y, q, k: model(x, q, k, y), X, X + 1, weights=weights(q=40, k=8))

    assert [step.layers for step in linears(traced)] == [1, 1, 1]
    names = [layout.name for layout in compile_program(traced).weights["forward"]]
    assert sorted(names) == ["k@f32", "q@f32"]


def test_a_weight_that_an_embedding_reads_too_is_stored_once() -> None:
    def model(x: Tensor, ids: Tensor, table: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        h = F.embedding(ids, table) + x
        return F.linear(h, table), F.linear(h, k)

    ids = torch.randint(70, (3, 5))
    traced = program(model, X, ids, weights=weights(table=70, k=8))

    assert [step.layers for step in linears(traced)] == [1, 1]
    assert sorted(w.name for w in compile_program(traced).weights["forward"]) == ["k@f32", "table@f32"]


@pytest.mark.parametrize("rows", [1, 4, 5, 130])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_that_only_a_linear_group_reads_is_its_packing(kind: str, rows: int) -> None:
    def model(x: Tensor, w: Tensor, b: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        h = rms_norm(x, w, 1e-5) if kind == "rms" else F.layer_norm(x, (40,), w, b, 1e-5)
        return F.linear(h, q), F.linear(h, k)

    made = {"w": torch.rand(40) + 0.5, "b": torch.randn(40)} | weights(q=41, k=6)
    x = torch.randn(rows, 40) * 3 + 1
    traced = program(model, X[0], weights=made)

    (step,) = linears(traced)
    assert step.norm is not None
    assert step.norm.kind == kind
    wide = {key: w.double() for key, w in made.items()}
    for found, expected in zip(ran(traced, x), model(x.double(), *(wide[k] for k in "wbqk")), strict=True):
        assert close(found.double(), expected)


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("normed", [True, False])
def test_a_rotation_that_only_linear_layers_read_is_their_packing(rows: int, normed: bool) -> None:
    def model(x: Tensor, w: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        h = rotated(rms_norm(x, w, 1e-5) if normed else x, 8)
        return F.linear(h, q), F.linear(h, k)

    made = {"w": torch.rand(40) + 0.5} | weights(q=41, k=6)
    x = torch.randn(rows, 40)
    traced = program(model, X[0], weights=made)

    (step,) = linears(traced)
    assert step.norm is not None
    assert step.norm.hadamard == 8
    expected = model(x.double(), *(made[k].double() for k in "wqk"))
    assert all(close(f.double(), e) for f, e in zip(ran(traced, x), expected, strict=True))


def test_a_rotation_that_others_read_is_computed_once() -> None:
    traced = program(lambda x, q: F.linear(rotated(x, 8), q) + rotated(x, 8), X, weights=weights(q=40))
    shared = program(lambda x, q: (lambda h: F.linear(h, q) + h)(rotated(x, 8)), X, weights=weights(q=40))

    assert linears(traced)[0].norm is not None
    assert linears(shared)[0].norm is None


def test_a_norm_that_others_read_is_computed_once() -> None:
    def model(x: Tensor, w: Tensor, q: Tensor) -> Tensor:
        h = rms_norm(x, w, 1e-5)
        return F.linear(h, q) + h

    traced = program(model, X, weights={"w": torch.ones(40)} | weights(q=40))

    assert linears(traced)[0].norm is None


def after_linear(x: Tensor, y: Tensor, w: Tensor, b: Tensor, kind: str) -> Tensor:
    z = F.linear(x, w, b)
    return {
        "residual": lambda: y + z,
        "activation": lambda: F.gelu(z),
        "column": lambda: z * b + 1.5,
        "both": lambda: torch.tanh(z) * b - y * z,
    }[kind]()


@pytest.mark.parametrize("kind", ["residual", "activation", "column", "both"])
@pytest.mark.parametrize("rows", [1, 7, 150])
def test_elementwise_work_is_an_epilogue(kind: str, rows: int) -> None:
    made = {"w": torch.randn(37, 40) / 6, "b": torch.randn(37)}
    x, y = torch.randn(rows, 2, 40), torch.randn(rows, 2, 37)
    traced = program(lambda x, y, w, b: after_linear(x, y, w, b, kind), X[:, :2], torch.randn(3, 2, 37), weights=made)

    assert linears(traced)[0].epilogue is not None
    wide = after_linear(x.double(), y.double(), made["w"].double(), made["b"].double(), kind)
    assert close(ran(traced, x, y)[0].double(), wide)


@pytest.mark.parametrize(
    "work",
    [
        lambda z, y: (z + y, z * 2),  # two readers
        lambda z, y: z.transpose(0, 1) + 1,  # another order
        lambda z, y: z + z.roll(1, 1),  # other places of the result
        lambda z, y: z + y[:, :, :1],  # a value per row
        lambda z, y: torch.softmax(z, -1),  # a reduction
    ],
)
def test_other_work_is_left_to_its_own_kernel(work: Callable[[Tensor, Tensor], object]) -> None:
    made = {"w": torch.randn(40, 40) / 6}
    traced = program(lambda x, y, w: work(F.linear(x, w), y), X, X + 1, weights=made)

    assert linears(traced)[0].epilogue is None
    expected = work(X.double() @ made["w"].double().T, (X + 1).double())
    wanted = list(expected) if isinstance(expected, tuple) else [expected]
    assert all(close(f.double(), e) for f, e in zip(ran(traced, X, X + 1), wanted, strict=True))


def test_an_epilogue_does_not_read_what_is_made_after_its_layer() -> None:
    def model(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        z = F.linear(x, q)
        return z + torch.softmax(y, -1).cumsum(-1)

    made = weights(q=40)
    traced = program(model, X, X + 1, weights=made)

    assert linears(traced)[0].epilogue is None
    assert close(ran(traced, X, X + 1)[0].double(), model(X.double(), (X + 1).double(), made["q"].double()))


def test_the_ledger_counts_fusions_and_the_bytes_they_save() -> None:
    def model(x: Tensor, w: Tensor, q: Tensor, k: Tensor) -> Tensor:
        h = rms_norm(x, w, 1e-5)
        return F.linear(h, q).relu() * F.linear(h, k).mean()

    traced = program(model, X, weights={"w": torch.ones(40)} | weights(q=40, k=8))
    with sv.compile(traced, target=TARGET) as compiled:
        fused = {f["kind"]: f for f in compiled.report["ledger"]["fusions"]}

    rows = 15 * 40 * 4
    assert fused["2 linear layers over one input"]["bytes_saved"] == rows
    assert fused["rms norm into the packing of a linear layer"]["bytes_saved"] == 2 * rows
    assert "fused in forward: rms norm" in str(compiled.ledger)
