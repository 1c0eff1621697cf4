"""Attention in int8: what its reference rounds and what smoothing is worth; which layers the pass gives it to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sylvester.compiler import quantized_ops
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import attention
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.quantized_ops import attention_bf16, attention_int8
from sylvester.passes import quantize_attention
from sylvester.passes.quantize_attention import QuantizeAttention
from tests import searching
from tests.programs import ops, program, reasons

INT8 = QuantizeAttention(products="int8")
FAR = 400.0
"""Of channels of keys that take whole numbers, or bfloat16, all their digits."""


def operands(keys: int = 200, key_bias: float = 0.0, value_bias: float = 0.0) -> list[Tensor]:
    """q [2, 4, 70, 64], k and v with half the heads, some channels of which are off zero."""
    q, k, v = torch.randn(2, 4, 70, 64), torch.randn(2, 2, keys, 64), torch.randn(2, 2, keys, 48)
    return [q, k + key_bias * torch.randn(1, 2, 1, 64), v + value_bias * torch.randn(1, 2, 1, 48)]


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


CALLS = {
    "causal": (200, (None, None, 0.125, True, 0)),
    "window": (200, (None, torch.tensor(90), 0.125, True, 50)),
    "mask": (90, ((torch.arange(90) % 7 > 1).expand(2, 1, 70, 90), None, 0.125, False, 0)),
    "cap": (200, (None, torch.tensor(11), 0.125, True, 0, 2.0)),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
def test_smoothing_alone_is_exact(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_ops, "_stepped", lambda x, axis, most=0: x)
    keys, others = CALLS[call]
    given = operands(keys, 3.0, 5.0)

    exact = attention.reference(*(x.double() for x in given), *others)
    assert error(attention_int8.reference(*given, *others), exact) < 1e-5


@each_call
@pytest.mark.parametrize(("key_bias", "value_bias"), [(0, 0), (8, 0), (0, 3), (8, 3)])
def test_close_to_attention(call: str, key_bias: float, value_bias: float) -> None:
    keys, others = CALLS[call]
    given = operands(keys, key_bias, value_bias)
    exact = attention.reference(*(x.double() for x in given), *others)

    y = attention_int8(*given, *others)

    assert torch.cosine_similarity(y.double().flatten(), exact.flatten(), dim=0) > 0.999
    assert 1e-5 < error(y, exact) < 2e-2
    assert torch.equal(y == 0, attention(*given, *others) == 0)


def test_keys_with_a_bias_need_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given, others = operands(200, 8.0), (None, None, 0.125, False, 0)
    exact = attention.reference(*(x.double() for x in given), *others)
    smooth = error(attention_int8.reference(*given, *others), exact)

    monkeypatch.setattr(quantized_ops, "_centred", lambda x, past, queries: (x, torch.zeros_like(x[:, :, :1])))

    assert smooth < 0.5 * error(attention_int8.reference(*given, *others), exact)


def test_keys_that_may_not_be_read_change_nothing() -> None:
    q, k, v = operands()
    others = (None, torch.tensor(60), 0.125, True, 0)
    expected = attention_int8(q, k, v, *others)
    k[:, :, 130:], v[:, :, 130:] = torch.nan, torch.inf

    assert torch.equal(attention_int8(q, k, v, *others), expected)


def three(*x: Tensor) -> tuple[Tensor, ...]:
    return tuple(attention(*x[n : n + 3], None, None, 0.125, True, 0) for n in (0, 3, 6))


def difficult() -> Program:
    """Three layers: any rounding will do, int8 will not, bfloat16 will not either."""
    plain, far, both = (torch.randn(3, 1, 2, 40, 64).unbind() for _ in range(3))
    for q, k, _ in (far, both):
        q[..., 0], k[..., 0] = 0, FAR * torch.randn(1, 2, 40).sign()
    both[0][..., 1:] *= 4
    both[1][..., 1:] += FAR * torch.randn(1, 2, 1, 63)
    return program(three, *plain, *far, *both)


def test_each_layer_gets_the_fastest_products_that_are_close_enough() -> None:
    made = difficult()
    assert ops(made) == ["sylvester.attention"] * 3

    after, ledger = Pipeline((INT8,)).run(made)

    assert ops(after) == ["sylvester.attention_int8", "sylvester.attention_bf16", "sylvester.attention"]
    changes = ledger.rows[0].changes
    assert changes.counts() == {"int8 attention": 1, "bf16 attention": 1}
    assert reasons(ledger) == ["neither int8 nor bf16 products are close enough, see the notes"]
    notes = "\n".join(changes.notes)
    assert "int8 attention is tried on the example inputs" in notes
    assert "attention_1: bf16, as its cosine to float32 is 0." in notes
    assert "attention_2: float32, as its cosine to float32 is" in notes
    lost = {(f.where, f.name): f.value for f in changes.figures}
    assert len(lost) == 6
    assert 0 < lost["attention", "1 - cosine of int8 attention"] < 1e-3
    assert lost["attention_1", "1 - cosine of int8 attention"] > 1e-3
    assert lost["attention_1", "1 - cosine of bf16 attention"] < 1e-3
    assert lost["attention_2", "1 - cosine of bf16 attention"] > 1e-3


def test_what_is_close_enough_is_an_option() -> None:
    after, _ = Pipeline((QuantizeAttention(products="int8", cosine=0.99999),)).run(difficult())

    assert ops(after)[0] == "sylvester.attention_bf16"


def test_all_entries_of_a_language_model_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made = searching.language_model()
    layers = len(made.main.calls(attention.target))
    found = [{"int8": 0.9, "bf16": 1.0}, *({"int8": 1.0, "bf16": 1.0} for _ in range(layers - 1))]
    monkeypatch.setattr(quantize_attention, "_cosines", lambda _: found)

    after, ledger = Pipeline((INT8,), check=False).run(made)

    expected = [attention_bf16.target, *[attention_int8.target] * (layers - 1)]
    for entry in after.entries.values():
        assert [n.target for n in entry.calls(*quantized_ops.ATTENTIONS)] == expected
    assert len(ledger.rows[0].changes.notes) == 1


def test_calibration_data_is_what_layers_are_tried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = searching.language_model(), []
    monkeypatch.setattr(quantize_attention, "watch", lambda program, sample, wanted, see: tried.append(sample))

    Pipeline((INT8,), check=False).run(made)

    assert tried == list(made.calibration.fit)


def test_wider_attention_is_left() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8, dtype=torch.float64) for _ in range(3))

    after, ledger = Pipeline((INT8,)).run(program(lambda *x: attention(*x, None, None, 0.5, True, 0), q, k, v))

    assert ops(after) == ["sylvester.attention"]
    assert reasons(ledger) == ["it computes in torch.float64, expected torch.float32"]


def test_data_is_needed_and_options_are_checked() -> None:
    made = difficult()
    made.main.examples.clear()
    with pytest.raises(CompileError, match=r"found no calibration data and no examples(.|\n)*products='bf16'"):
        Pipeline((INT8,)).run(made)
    with pytest.raises(ValueError, match="products is 'int4', expected one of"):
        QuantizeAttention(products="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cosine is 1, expected a number between 0 and 1"):
        QuantizeAttention(products="int8", cosine=1)
