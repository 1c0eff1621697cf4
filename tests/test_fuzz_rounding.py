"""The bounds on what rounding to bfloat16 may move hold and are not empty; a fixed share of the result is no bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.fuzz import rounding
from tests.fuzz.campaign import replay
from tests.fuzz.graphs import Graph, Ref, Source, Step
from tests.sampling import Sample

dialect = torch.ops.sylvester
FORMS = {
    "plain": (None, None, 0.35, False, 0, 0.0),
    "causal, capped": (None, None, 0.35, True, 3, 1.5),
    "masked": ("mask", None, 0.5, False, 0, 0.0),
    "over a cache": (None, "past", 0.35, True, 0, 0.0),
}


def operands(size: float, form: str) -> tuple[list[Tensor], tuple[object, ...]]:
    """q, k of this size and v in float64, and the other arguments."""
    shapes = (2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    values = {"mask": torch.rand(2, 1, 5, 9) < 0.7, "past": torch.tensor(3)}
    return [q * size, k * size, v], tuple(values[x] if isinstance(x, str) else x for x in FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 10.0])
def test_attention_stays_within_its_bound(size: float, form: str) -> None:
    """As the reference rounds, and with each of the operands rounded alone."""
    for _ in range(20):
        tensors, rest = operands(size, form)
        exact = dialect.attention(*tensors, *rest)
        bound = rounding.attention(*tensors, *rest)
        assert bool(((dialect.attention_bf16(*tensors, *rest) - exact).abs() <= bound).all())
        for n in range(3):
            rounded = [t.bfloat16().double() if k == n else t for k, t in enumerate(tensors)]
            assert bool(((dialect.attention(*rounded, *rest) - exact).abs() <= bound).all())


def test_the_bound_of_attention_says_something() -> None:
    tensors, rest = operands(1.0, "plain")
    largest = dialect.attention(*tensors, *rest).abs().max()

    assert float(rounding.attention(*tensors, *rest).max()) < 0.15 * float(largest)


def test_large_scores_move_attention_by_more_than_a_share_of_the_result() -> None:
    """Scores of several hundred round by one: which key is read may change, and no kernel is at fault."""
    worst = 0.0
    for _ in range(50):
        tensors, rest = operands(10.0, "plain")
        exact = dialect.attention(*tensors, *rest)
        found = dialect.attention_bf16(*tensors, *rest) - exact
        worst = max(worst, float(found.abs().max() / exact.abs().max()))
        assert bool((found.abs() <= rounding.attention(*tensors, *rest)).all())

    assert worst > 8e-2


def test_linear_layers_stay_within_their_bound() -> None:
    x, weight = torch.randn(7, 65, dtype=torch.float64) * 3, torch.randn(9, 65).bfloat16()
    exact = x @ weight.double().T
    bound = rounding.linear(x, weight)

    assert bool(((dialect.linear_bf16(x, weight) - exact).abs() <= bound).all())
    assert float(bound.max()) < 0.1 * float(exact.abs().max())


@pytest.mark.slow
def test_native_attention_with_large_scores_is_within_the_bound() -> None:
    shapes = (2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8)
    sources = tuple(Source(Sample(shape), k) for k, shape in enumerate(shapes))
    scaled = tuple(Step(torch.ops.aten.mul.Tensor, (Ref(k), 12.0), {}) for k in range(2))
    call = Step(dialect.attention_bf16.default, (Ref(3), Ref(4), Ref(2), None, None, 0.35, True, 0), {})

    replay("native", Graph((*sources, *scaled, call), (5,)))
