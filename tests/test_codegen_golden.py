"""The C text of small entries: loop functions and plans, without the prelude."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sylvester.codegen.compile import compile_program
from tests.programs import program

rms_norm, swiglu = torch.ops.sylvester.rms_norm, torch.ops.sylvester.swiglu
X = torch.randn(2, 5, 24)


def residual_norm(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + y
    return rms_norm(h, w, 1e-6), h


def softmax(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x * w, -1)


def feed_forward(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    h = F.linear(rms_norm(x, w, 1e-6), torch.eye(24)[:24] * w)
    return x + swiglu(h, y)


def heads(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    split = x.view(*x.shape[:2], 3, 8).transpose(1, 2)
    return split.transpose(1, 2).flatten(2) + torch.cat((y[..., 12:], y[..., :12]), -1)


@pytest.mark.parametrize("function", [residual_norm, softmax, feed_forward, heads], ids=lambda f: f.__name__)
def test_c_text(function: Callable[..., object], golden: Callable[[str], None]) -> None:
    unit = compile_program(program(function, X, X.clone(), weights={"w": torch.ones(24)})).unit

    loops = [text.replace("NAME", name, 1) for text, name in unit.functions.items()]
    golden("\n\n".join([*loops, *unit.plans]) + "\n")


def layers(count: int) -> Callable[..., Tensor]:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for n in range(count):
            x = x + torch.softmax(F.linear(rms_norm(x, weights[2 * n], 1e-6), weights[2 * n + 1]), -1)
        return x

    return model


def functions(count: int) -> int:
    weights = {f"w{n}": torch.randn(24) if n % 2 == 0 else torch.randn(24, 24) for n in range(2 * count)}
    return len(compile_program(program(layers(count), X, weights=weights)).unit.functions)


def test_equal_nests_of_different_layers_are_one_function() -> None:
    assert functions(5) == functions(3)
