"""Constant folding: what needs no input becomes a weight, unless it would grow the program or its size is unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.trace import capture
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.fold_constants import FoldConstants
from tests import zoo
from tests.programs import ops, program

x = torch.randn(3, 5, 8)


def folded(made: Program, limit: int = 0) -> Program:
    return Pipeline((Canonicalize(), FoldConstants(limit)))(made)


def test_transposed_weight_is_stored_transposed() -> None:
    w = torch.randn(8, 6)
    made = folded(program(lambda x, w: x @ w, x, weights={"proj": w}))

    assert ops(made) == ["aten.linear"]
    assert list(made.weights) == ["proj.t"]
    assert made.weights["proj.t"].is_contiguous()
    torch.testing.assert_close(made.weights["proj.t"], w.T)


def test_chain_of_weights_becomes_one() -> None:
    weights = {"a": torch.randn(8), "b": torch.randn(8)}
    made = folded(program(lambda x, a, b: x * ((1 + a) * b.exp()), x, weights=weights))

    assert ops(made) == ["aten.mul.Tensor"]
    torch.testing.assert_close(made.weights["a.mul"], (1 + weights["a"]) * weights["b"].exp())


def test_table_of_known_size_is_folded() -> None:
    made = folded(program(lambda x, w: x * w * torch.arange(8).cos(), x, weights={"w": torch.randn(8)}), limit=32)

    assert ops(made) == ["aten.mul.Tensor", "aten.mul.Tensor"]
    torch.testing.assert_close(made.weights["constant.cos"], torch.arange(8).cos())


def test_table_of_symbolic_size_is_computed_at_run_time() -> None:
    made = folded(program(lambda x: x + torch.arange(x.shape[1])[:, None].cos(), x), limit=1 << 20)

    assert "aten.cos" in ops(made)
    assert not made.weights


def test_expanded_weight_is_stored_once() -> None:
    weights = {"w": torch.randn(8)}
    made = folded(program(lambda x, w: torch.cat((x, (2 * w).expand(3, 700, 8)), 1), x[:, :1], weights=weights))

    assert ops(made) == ["aten.expand", "aten.cat"]
    assert made.weights["w.mul"].shape == (8,)


def test_result_that_grows_the_program_is_refused() -> None:
    made = program(lambda x, w: x + (w[:, None] * w[None, :]), torch.randn(8, 8), weights={"w": torch.randn(8)})
    made, ledger = Pipeline((Canonicalize(), FoldConstants(100))).run(made)

    assert list(made.weights) == ["w"]
    assert [r.reason for r in ledger.rows[1].changes.refused] == ["grows the weights by 224 bytes, the limit is 100"]


def test_weight_that_something_else_uses_counts_in_full() -> None:
    made = program(lambda x, w: x @ w @ w.mT, torch.randn(3, 8), weights={"w": torch.randn(8, 8)})
    made, ledger = Pipeline((Canonicalize(), FoldConstants(0))).run(made)

    assert list(made.weights) == ["w"]
    assert "grows the weights by 256 bytes" in ledger.rows[1].changes.refused[0].reason


def test_uniform_constant_becomes_a_fill() -> None:
    made = folded(program(lambda x, w: x * w + torch.arange(8).ge(-1).float(), x, weights={"w": torch.randn(8)}))

    assert "aten.ge.Scalar" not in ops(made)
    assert list(made.weights) == ["w"]


def test_scalar_weight_becomes_a_number() -> None:
    made = folded(program(lambda x, s: x * s, x, weights={"s": torch.tensor(0.125)}))

    assert made.main.calls()[0].args[1] == 0.125
    assert not made.weights


def test_random_values_are_not_constants() -> None:
    made = program(lambda x, w: x + torch.rand(8) * w, x, weights={"w": torch.randn(8)})
    Canonicalize().run(made)
    FoldConstants().run(made)

    assert "aten.rand" in ops(made)


def test_entries_share_what_is_folded() -> None:
    made = program(lambda x, w: x @ w, x, weights={"w": torch.randn(8, 6)})
    made.entries["again"] = made.main.clone()
    made = folded(made)

    assert list(made.weights) == ["w.t"]


def test_gpt2_products_become_linears_over_stored_weights() -> None:
    case = zoo.case("gpt2")
    before = capture(case.model, case.inputs)
    made = folded(before, limit=FoldConstants.limit)

    assert "transformer.h.0.attn.c_attn.weight.t" in made.weights
    assert abs(made.weights.nbytes - before.weights.nbytes) < 100
    for inputs in case.other:
        torch.testing.assert_close(made.run("forward", inputs), before.run("forward", inputs), rtol=1e-4, atol=1e-4)


def test_half_precision_is_folded_in_its_own_type() -> None:
    weights: dict[str, Tensor] = {"w": torch.randn(8).bfloat16()}
    made = folded(program(lambda x, w: x * (1 + w), x.bfloat16(), weights=weights))

    assert made.weights["w.add"].dtype == torch.bfloat16
    assert torch.equal(made.weights["w.add"], 1 + weights["w"])


def test_a_constant_that_another_constant_and_the_model_use() -> None:
    """Found by the fuzzer: the outer constant is made of the weight that the inner one became."""
    weights = {"w": torch.randn(8)}
    made = folded(program(lambda x, w: (x * w.exp(), x * w.exp().cos()), x, weights=weights), limit=64)

    assert ops(made) == ["aten.mul.Tensor", "aten.mul.Tensor"]
    torch.testing.assert_close(made.weights["w.exp"], weights["w"].exp())
    assert len(made.weights) == 2
