"""Elementwise work done in the kernels of convolutions, and when it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sylvester as sv
from sylvester.codegen.compile import plans
from sylvester.codegen.epilogue import fuse_epilogues
from sylvester.codegen.lazy import Extern
from sylvester.compiler.program import Program
from tests.programs import program

TARGET = sv.Target("cpu", threads=2, isas=("avx2",))


def steps(traced: Program) -> list[str]:
    """The steps that are left: "conv" or the name of another kind."""
    found = fuse_epilogues(plans(traced)["forward"])
    return ["conv" if isinstance(s, Extern) else type(s).__name__ for s in found]


def ran(traced: Program, *inputs: Tensor) -> Tensor:
    with sv.compile(traced, target=TARGET) as compiled:
        result: Tensor = compiled(*inputs)
    return result


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-6 * expected.abs().max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [7, 21])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_activation_and_residual_are_done_in_the_convolution(groups: int, size: int, batch: int) -> None:
    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.hardtanh(F.conv2d(x, a, None, 1, 1, 1, groups), 0.0, 6.0)
        return F.relu(F.conv2d(y, b, None, 1, 1, 1, groups) + x)

    made = {name: torch.randn(6, 6 // groups, 3, 3) / 3 for name in "ab"}
    x = torch.randn(batch, 6, size, size + 2)
    traced = program(model, x, weights=made)

    assert steps(traced) == ["conv", "conv"]
    exact = model(x.double(), made["a"].double(), made["b"].double())
    assert close(ran(traced, x).double(), exact)


def test_work_at_another_place_of_the_result_is_a_step_of_its_own() -> None:
    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.pad(F.relu(F.conv2d(x, a)), [1, 1, 1, 1])
        return F.conv2d(y.transpose(2, 3), b)

    made = {name: torch.randn(4, 4, 3, 3) / 3 for name in "ab"}
    x = torch.randn(1, 4, 9, 12)
    traced = program(model, x, weights=made)

    assert steps(traced) == ["conv", "Store", "conv"]
    assert close(ran(traced, x).double(), model(x.double(), made["a"].double(), made["b"].double()))


def test_result_with_two_readers_is_stored_once_for_both() -> None:
    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, a, None, 1, 1))
        return F.conv2d(y, b, None, 1, 1) + y

    made = {name: torch.randn(4, 4, 3, 3) / 3 for name in "ab"}
    x = torch.randn(2, 4, 9, 12)
    traced = program(model, x, weights=made)

    assert steps(traced) == ["conv", "conv"]
    assert close(ran(traced, x).double(), model(x.double(), made["a"].double(), made["b"].double()))
