"""Scales and batch norms go into the weights before or after them; shared weights and results refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylvester.compiler import ops as dialect
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.fold_constants import FoldConstants
from sylvester.passes.fold_weights import FoldWeights
from tests.programs import ops, program

x = torch.randn(3, 5, 8)
W = {"w": torch.randn(6, 8), "b": torch.randn(6)}


def folded(function: Callable[..., Tensor] | nn.Module, *args: Tensor, **weights: Tensor) -> tuple[Program, Changes]:
    """Fold, with the pipeline's check on; compare in float64 with the function at another size."""
    made = program(function, *args, weights=weights)
    made, ledger = Pipeline((Canonicalize(), FoldConstants(), Canonicalize(), FoldWeights())).run(made)
    other = [torch.randn(7, *a.shape[1:]) for a in args]
    got = made.run("forward", {f"x{i}": a for i, a in enumerate(other)})["y0"]
    with torch.no_grad():
        exact = function.double() if isinstance(function, nn.Module) else function
        want = exact(*(t.double() for t in (*other, *weights.values())))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    return made, ledger.rows[-1].changes


def norm(module: nn.Module) -> nn.Module:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5) if "var" in name else tensor.data.normal_()
    return module.eval()


CONVOLUTIONS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 4, 9, 7)),
    "conv2d without bias": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), torch.randn(2, 4, 9, 7)),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.BatchNorm2d(4)), torch.randn(2, 4, 9, 7)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5)), torch.randn(2, 4, 9)),
    "linear": (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), torch.randn(3, 4)),
    "not affine": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_batch_norm_goes_into_the_weights_before(name: str) -> None:
    module, image = CONVOLUTIONS[name]

    made, changes = folded(norm(module), image)

    assert len(ops(made)) == 1
    assert changes.counts() == {"fold_batch_norm": 1}


def test_batch_norm_alone_is_a_scale_and_a_shift() -> None:
    made, _ = folded(norm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))), torch.randn(2, 4, 5, 5))

    assert ops(made) == ["aten.relu", "aten.mul.Tensor", "aten.add.Tensor"]
    assert set(made.weights) == {"1.scale", "1.shift"}


def test_batch_norm_of_a_value_with_two_users_leaves_its_convolution() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y.relu()

    made, _ = folded(norm(Fork()), torch.randn(2, 4, 5, 5))

    assert "conv.weight" in made.weights


SCALED: dict[str, Callable[..., Tensor]] = {
    "after": lambda x, w, b: F.linear(x, w, b) * 0.25,
    "divided": lambda x, w, b: F.linear(x, w, b) / 3,
    "per output channel": lambda x, w, b: F.linear(x, w) * b,
    "before": lambda x, w, b: F.linear(x * 2.5, w, b),
    "before two": lambda x, w, b: F.linear(x.exp() * 2.5, w, b),
    "before and after": lambda x, w, b: F.linear(x * 2.5, w, b) / 2.5,
}


@pytest.mark.parametrize("name", SCALED)
def test_scale_goes_into_the_linear(name: str) -> None:
    made, changes = folded(SCALED[name], x, **W)

    assert set(ops(made)) <= {"aten.linear", "aten.exp"}
    assert changes.applied
    assert not changes.refused


def test_gain_per_input_channel_goes_into_every_reader() -> None:
    made, _ = folded(lambda x, g, u, v: F.linear(x * g, u) * F.linear(x * g, v).relu(), x,
                     g=torch.randn(8), u=torch.randn(6, 8), v=torch.randn(6, 8))  # fmt: skip

    assert ops(made) == ["aten.linear", "aten.linear", "aten.relu", "aten.mul.Tensor"]
    assert set(made.weights) == {"u.scaled", "v.scaled"}


def test_convolution_takes_a_gain_per_channel() -> None:
    weights = {"w": torch.randn(6, 4, 3, 3), "g": torch.randn(6, 1, 1)}

    made, _ = folded(lambda x, w, g: F.conv2d(x, w) * g, torch.randn(2, 4, 5, 5), **weights)

    assert ops(made) == ["aten.conv2d"]


UNFOLDABLE: dict[str, Callable[..., Tensor]] = {
    "per row": lambda x, w, g: F.linear(x, w) * g,
    "result used twice": lambda x, w, g: F.linear(x, w) * 2 + F.linear(x, w).relu(),
    "input used elsewhere": lambda x, w, g: F.linear((x * 3).exp(), w) + (x * 3)[..., :6],
    "by zero": lambda x, w, g: F.linear(x, w) * 0,
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_is_no_channel_scale_stays(name: str) -> None:
    made, changes = folded(UNFOLDABLE[name], x, w=torch.randn(6, 8), g=torch.randn(5, 1))

    assert "aten.mul.Tensor" in ops(made)
    assert not changes.applied


def test_shared_weight_refuses() -> None:
    made, changes = folded(lambda x, w: F.linear(F.linear(x, w) * 2, w), x, w=torch.randn(8, 8))

    assert list(made.weights) == ["w"]
    assert {r.reason for r in changes.refused} == {"weight 'w' is shared by 2 calls"}
    assert not changes.applied


def test_two_entries_get_one_scaled_weight() -> None:
    made = program(lambda x, w: F.linear(x, w) * 2, x, weights={"w": torch.randn(6, 8)})
    made.entries["again"] = made.main.clone()
    made = Pipeline((Canonicalize(), FoldWeights()))(made)

    assert list(made.weights) == ["w.scaled"]


def test_scaled_queries_and_keys_go_into_the_attention_scale() -> None:
    def attend(x: Tensor) -> Tensor:
        q, k = (y.view(x.shape[0], 5, 2, 4).transpose(1, 2) for y in (x * 0.5, x.exp() / 4))
        used_twice = F.scaled_dot_product_attention(q, k, k.exp(), scale=1.0)
        return used_twice + F.scaled_dot_product_attention(q.exp() * 2, q, q)

    made, changes = folded(attend, x)

    scales = [n.kwargs["scale"] for n in made.main.calls(torch.ops.aten.scaled_dot_product_attention.default)]
    assert scales == [1.0, 2 / 4**0.5]
    assert changes.counts() == {"fold_attention_scale": 1}


def test_scale_of_dialect_attention() -> None:
    made, _ = folded(lambda q: dialect.attention(q * 3.0, q, q, None, None, 0.5, True, 0), torch.randn(2, 2, 5, 4))

    assert ops(made) == ["sylvester.attention"]
    assert made.main.calls()[0].args[5] == 1.5


def test_a_scaled_value_that_is_several_operands_stays() -> None:
    def attend(x: Tensor) -> Tensor:
        y, z = x * 0.5, x * 3.0
        return F.scaled_dot_product_attention(y, y, x) + F.scaled_dot_product_attention(z, x, z)

    _, changes = folded(attend, torch.randn(2, 2, 5, 4))

    assert not changes.applied


@pytest.mark.parametrize("norm", [False, True])
def test_a_computed_bias_refuses(norm: bool) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, w, x.sum(0)[:6] + b)
        return F.batch_norm(y, torch.zeros_like(b) + b, b * b + 1) if norm else y * 0.5

    made, _ = folded(function, torch.randn(3, 8), **W)

    assert "aten.mul.Tensor" in ops(made)
