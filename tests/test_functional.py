"""From an exported graph to a functional one: in-place operations, regions and asserts disappear, the values stay."""

from __future__ import annotations

import pytest
import torch

from sylvester.compiler.trace import capture
from sylvester.compiler.verify import verify
from tests.test_trace import module, targets


def test_asserts_and_dead_code_are_dropped():
    def forward(self, x):
        torch._check(x.shape[0] > 1)
        x.sum()
        return x + 1

    assert targets(capture(module(forward), (torch.randn(3, 2),))) == ["aten.add.Tensor"]


def test_gradient_regions_are_inlined():
    def forward(self, x):
        with torch.enable_grad():
            y = x * 2
        return y + 1

    program = capture(module(forward), (torch.randn(3, 2),))

    assert targets(program) == ["aten.mul.Tensor", "aten.add.Tensor"]


def in_place_chain(self, x):
    y = x * 2
    y += 1
    y.relu_().mul_(3)
    return y.masked_fill_(y > 4, 0.0)


def in_place_on_input(self, x):
    return x.relu_() + 1


def in_place_through_a_view(self, x):
    y = x * 1
    y[:, 0].add_(5)
    return y


def in_place_seen_elsewhere(self, x):
    y = x * 1
    z = y.view(-1)
    y.add_(1)
    return z


def in_place_inside_a_region(self, x):
    y = x * 2
    with torch.enable_grad():
        y.add_(1)
    return y


@pytest.mark.parametrize(
    "forward",
    [in_place_chain, in_place_on_input, in_place_through_a_view, in_place_seen_elsewhere, in_place_inside_a_region],
)
def test_in_place_operations_become_functional(forward):
    x = torch.randn(3, 4)

    program = capture(module(forward), (x.clone(),))

    verify(program)
    torch.testing.assert_close(program.run("forward", {"x": x.clone()})["out0"], module(forward)(x.clone()))
    other = torch.randn(5, 4)
    torch.testing.assert_close(program.run("forward", {"x": other.clone()})["out0"], module(forward)(other.clone()))


def test_local_rule_avoids_functionalisation():
    program = capture(module(in_place_chain), (torch.randn(3, 4),))

    assert targets(program) == [
        "aten.mul.Tensor", "aten.add.Tensor", "aten.relu.default", "aten.mul.Tensor", "aten.gt.Scalar",
        "aten.masked_fill.Scalar",
    ]  # fmt: skip
