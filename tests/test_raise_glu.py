"""Activations in arithmetic and gated feed-forward parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.pipeline import Pipeline
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.raise_glu import RaiseGlu
from tests.programs import ops, program, reasons

RAISE = Pipeline((Canonicalize(), RaiseGlu()))

GELUS = [
    lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421)),
    lambda x: x * (0.5 * (torch.erf(x * 0.7071067811865476) + 1)),
]
NEW_GELUS = [
    lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
    lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
]


def only_op(function: Callable[[Tensor], Tensor]) -> torch.fx.Node:
    after = RAISE(program(function, torch.randn(3, 8)))
    (node,) = after.main.calls()
    return node


@pytest.mark.parametrize("form", [0, 2])
def test_gelu(form: int) -> None:
    node = only_op(GELUS[form])

    assert (node.target, node.kwargs) == (torch.ops.aten.gelu.default, {})


@pytest.mark.parametrize("form", [0, 1])
def test_gelu_by_tanh(form: int) -> None:
    node = only_op(NEW_GELUS[form])

    assert (node.target, node.kwargs) == (torch.ops.aten.gelu.default, {"approximate": "tanh"})


def test_a_rounded_constant_is_another_function() -> None:
    assert "aten.gelu" not in ops(RAISE(program(GELUS[1], torch.randn(3, 8))))


def test_silu() -> None:
    assert only_op(lambda x: torch.sigmoid(x) * x).target is torch.ops.aten.silu.default


def test_sigmoid_of_another_value_is_no_silu() -> None:
    assert "aten.silu" not in ops(RAISE(program(lambda x: torch.sigmoid(1.702 * x) * x, torch.randn(3, 8))))


def test_swiglu_in_either_order_and_from_parts_of_one_projection() -> None:
    def fused(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return up * F.silu(gate)

    def written_out(gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(gate) * up

    assert ops(RAISE(program(fused, torch.randn(3, 8))))[-1] == "sylvester.swiglu"
    assert ops(RAISE(program(written_out, torch.randn(3, 8), torch.randn(3, 8)))) == ["sylvester.swiglu"]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_keeps_its_approximation(approximate: str) -> None:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate=approximate) * up

    (node,) = RAISE(program(gated, torch.randn(3, 8), torch.randn(3, 8))).main.calls()

    assert node.args[2] == approximate


def test_a_broadcast_gate_is_refused() -> None:
    built = program(lambda gate, x: F.silu(gate) * x, torch.randn(3, 1), torch.randn(3, 8))

    after, ledger = RAISE.run(built)

    assert ops(after) == ["aten.silu", "aten.mul.Tensor"]
    assert "expected equal shapes" in reasons(ledger)[0]


def test_an_activation_with_another_use_is_refused() -> None:
    def twice(gate: Tensor, up: Tensor) -> Tensor:
        active = F.silu(gate)
        return active * up + active

    after, ledger = RAISE.run(program(twice, torch.randn(3, 8), torch.randn(3, 8)))

    assert "sylvester.swiglu" not in ops(after)
    assert reasons(ledger) == ["an inner value is also used outside the pattern"]
