"""The calibration walk: values as a plain run gives them, only what is needed, nothing kept for longer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.compiler.calls import arguments
from sylvester.compiler.causal_lm import analyse
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program
from sylvester.compiler.walk import Walk
from tests import zoo
from tests.programs import program

LINEAR = torch.ops.aten.linear.default


def chain(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(F.linear(x, a))
    z = F.linear(y, b) + y
    return F.linear(z, c), torch.exp(z)


def chain_program() -> Program:
    return program(chain, torch.randn(2, 3, 8), weights={n: torch.randn(8, 8) for n in "abc"})


def samples(count: int) -> list[dict[str, Tensor]]:
    return [{"x0": torch.randn(1 + i % 2, 2 + i, 8)} for i in range(count)]


def go(walk: Walk, program: Program, stop) -> list[Tensor]:
    """Reach a linear layer, put its value, return its inputs."""
    walk.reach(stop)
    given = arguments(stop)
    xs = walk.values(given["input"])
    for i, x in enumerate(xs):
        walk.put(stop, i, F.linear(x, program.weights[given["weight"].meta["bind"].key]))
    return xs


def test_inputs_of_every_layer() -> None:
    made, data = chain_program(), samples(4)
    stops = made.main.calls(LINEAR)
    walk = Walk(made, data, stops)

    found = [go(walk, made, stop) for stop in stops]

    w = made.weights
    for i, sample in enumerate(data):
        y = torch.tanh(F.linear(sample["x0"], w["a"]))
        for xs, expected in zip(found, (sample["x0"], y, F.linear(y, w["b"]) + y), strict=True):
            torch.testing.assert_close(xs[i], expected)


def test_what_is_put_flows_on() -> None:
    made, data = chain_program(), samples(2)
    first, second, _ = made.main.calls(LINEAR)
    walk = Walk(made, data, [first, second])
    walk.reach(first)
    for i in range(2):
        walk.put(first, i, torch.full((2, 8), 0.5))

    walk.reach(second)

    assert all(x.equal(torch.tanh(torch.full((2, 8), 0.5))) for x in walk.values(arguments(second)["input"]))


def test_a_value_that_is_wanted_must_be_put() -> None:
    made = chain_program()
    first, second, third = made.main.calls(LINEAR)
    walk = Walk(made, samples(1), [first, second, third])
    assert [walk.wanted(stop) for stop in (first, second, third)] == [True, True, False]
    walk.reach(first)

    with pytest.raises(ValueError, match="no value was put for %linear"):
        walk.reach(second)


def test_only_what_stops_need_is_computed_and_the_dead_are_dropped() -> None:
    made, data = chain_program(), samples(3)
    stops = made.main.calls(LINEAR)
    walk = Walk(made, data, stops)
    assert not any("exp" in str(node.target) for node in walk.order)

    walk.reach(stops[0])
    go(walk, made, stops[0])
    ys = [weakref.ref(y) for y in go(walk, made, stops[1])]
    gc.collect()
    assert None not in [ref() for ref in ys]
    go(walk, made, stops[2])
    gc.collect()
    assert [ref() for ref in ys] == [None] * 3
    assert all(len(values) <= 2 for values in walk.samples)


def test_a_replaced_weight_is_not_held() -> None:
    made = chain_program()
    first, second, _ = made.main.calls(LINEAR)
    walk = Walk(made, samples(2), [first, second])
    go(walk, made, first)
    held = weakref.ref(made.weights["a"])

    del made.weights["a"]
    gc.collect()

    assert held() is None
    assert len(go(walk, made, second)) == 2


def test_an_input_that_a_sample_lacks() -> None:
    made = chain_program()

    with pytest.raises(CompileError, match=r"a calibration sample has no 'x0'\nhint: it has \['x'\]"):
        Walk(made, [{"x": torch.zeros(1, 2, 8)}], made.main.calls(LINEAR))


def test_layers_of_a_language_model() -> None:
    case = zoo.case("llama-gqa")
    made = sv.trace(case.model, case.inputs)
    assert analyse(made)
    ids = case.inputs["input_ids"]
    inputs: dict[str, list[Tensor]] = {}
    modules = {name: m for name, m in case.model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, x, n=n: inputs.setdefault(n, []).append(x[0])) for n, m in modules.items()
    ]
    for row in ids:
        case.model(input_ids=row[None])
    for hook in hooks:
        hook.remove()

    stops = made.main.calls(LINEAR)
    walk = Walk(made, [{"input_ids": row[None]} for row in ids], stops)
    found = [go(walk, made, stop) for stop in stops]

    assert len(found) == len(modules)
    for stop, xs in zip(stops, found, strict=True):
        name = arguments(stop)["weight"].meta["bind"].key.removesuffix(".weight")
        for x, expected in zip(xs, inputs[name], strict=True):
            assert x.shape == expected.shape
            torch.testing.assert_close(x, expected.detach(), rtol=1e-3, atol=1e-3)
