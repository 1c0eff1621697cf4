"""The C text of small entries: loop functions and plans, without the prelude."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sylvester.codegen.compile import compile_program
from tests.programs import program

rms_norm, swiglu = torch.ops.sylvester.rms_norm, torch.ops.sylvester.swiglu
WIDTH = 96
X = torch.randn(2, 5, WIDTH)


def residual_norm(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + y
    return rms_norm(h, w, 1e-6), h


def softmax(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x * w, -1)


def feed_forward(x: Tensor, y: Tensor, w: Tensor, m: Tensor) -> Tensor:
    return x + swiglu(F.linear(rms_norm(x, w, 1e-6), m, w), y)


def heads(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    split = x.view(*x.shape[:2], 3, WIDTH // 3).transpose(1, 2)
    return split.transpose(1, 2).flatten(2) + torch.cat((y[..., 36:], y[..., :36]), -1)


@pytest.mark.parametrize("function", [residual_norm, softmax, feed_forward, heads], ids=lambda f: f.__name__)
def test_c_text(function: Callable[..., object], golden: Callable[[str], None]) -> None:
    weights = {"w": torch.ones(WIDTH), "m": torch.eye(WIDTH)}
    used = inspect.signature(function).parameters
    traced = program(function, X, X.clone(), weights={key: weights[key] for key in weights if key in used})
    unit = compile_program(traced).unit

    loops = [text.replace("NAME", name, 1) for text, name in unit.functions.items()]
    golden(numbered("\n\n".join([*loops, *unit.plans])) + "\n")


def numbered(text: str) -> str:
    """The symbols of torch by order of appearance; their own numbers differ between versions of torch."""
    names: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda m: names.setdefault(m[0], f"s{len(names)}"), text)


def layers(count: int) -> Callable[..., Tensor]:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for n in range(count):
            x = x + torch.softmax(F.linear(rms_norm(x, weights[2 * n], 1e-6), weights[2 * n + 1]), -1)
        return x

    return model


def functions(count: int) -> int:
    weights = {f"w{n}": torch.randn(WIDTH) if n % 2 == 0 else torch.randn(WIDTH, WIDTH) for n in range(2 * count)}
    return len(compile_program(program(layers(count), X, weights=weights)).unit.functions)


def test_equal_nests_of_different_layers_are_one_function() -> None:
    assert functions(5) == functions(3)
