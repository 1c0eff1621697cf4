"""Regions of tiny residual stacks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program, binding
from sylvester.compiler.region import Region, bypass, rebind
from sylvester.compiler.verify import verify
from tests.programs import ops, program


def stack(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = x + torch.relu(x @ first)
    return x + torch.relu(x @ second)


def two_blocks() -> Program:
    return program(stack, torch.randn(3, 4), weights={"first": torch.randn(4, 4), "second": torch.randn(4, 4)})


def sums(built: Program) -> list[torch.fx.Node]:
    return built.main.calls(torch.ops.aten.add.Tensor)


def test_between_holds_the_block_and_its_borders() -> None:
    built = two_blocks()
    start, end = sums(built)

    region = Region.between(start, end)

    assert len(region.nodes) == 3
    assert region.outputs == (end,)
    assert [binding(n).key for n in region.weights()] == ["second"]
    assert start in region.inputs


def test_between_unrelated_values_is_an_error() -> None:
    start, end = sums(two_blocks())

    with pytest.raises(CompileError, match="does not depend on"):
        Region.between(end, start)


def test_bypass_leaves_the_other_block() -> None:
    built = two_blocks()
    x, first = built.main.examples["x0"], built.weights["first"]

    bypass(built.main, *sums(built))
    built.sweep()

    verify(built)
    assert ops(built) == ["aten.matmul", "aten.relu", "aten.add.Tensor"]
    assert list(built.weights) == ["first"]
    torch.testing.assert_close(built.run("forward", {"x0": x})["y0"], x + torch.relu(x @ first))


def test_bypass_refuses_another_shape() -> None:
    built = program(lambda x: x.sum(-1) * 2, torch.randn(3, 4))
    node = built.main.calls()[-1]

    with pytest.raises(CompileError, match="shape and type must be equal"):
        bypass(built.main, built.main.placeholders("input")[0], node)


def test_rebind_shares_a_weight_in_one_block_only() -> None:
    built = two_blocks()
    x, first = built.main.examples["x0"], built.weights["first"]
    region = Region.between(*sums(built))

    rebind(built.main, built.weights, {region.weights()[0]: "first"}, region.nodes)
    built.sweep()

    verify(built)
    assert list(built.weights) == ["first"]
    torch.testing.assert_close(built.run("forward", {"x0": x})["y0"], stack(x, first, first))


def test_rebind_refuses_another_shape() -> None:
    built = two_blocks()
    built.weights["wide"] = torch.randn(4, 5)
    region = Region.between(*sums(built))

    with pytest.raises(CompileError, match="cannot bind 'second'"):
        rebind(built.main, built.weights, {region.weights()[0]: "wide"}, region.nodes)
