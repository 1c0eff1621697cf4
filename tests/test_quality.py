"""What lossy passes cost: perplexity, KL and agreement against formulas in float64, and what the ledger says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import sylvester as sv
from sylvester.compiler import measure, quality
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.changes import Changes, Figure
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ledger import summaries
from sylvester.compiler.next_token import language_model
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.passes import QuantizeCache
from tests import zoo
from tests.programs import bigram, program

VOCABULARY = 11
SHAPES = ((2, 5), (1, 90), (3, 2))


def tables(seed=0):
    torch.manual_seed(seed)
    first = 2 * torch.randn(VOCABULARY, VOCABULARY)
    return first, first + 0.5 * torch.randn(VOCABULARY, VOCABULARY)


def samples(*shapes):
    return tuple({"x0": torch.randint(VOCABULARY, shape)} for shape in shapes or SHAPES)


def pairs(data):
    """Every token that has a next one, and that one."""
    return tuple(torch.cat([s["x0"][:, part].flatten() for s in data]) for part in (slice(0, -1), slice(1, None)))


@dataclass(frozen=True)
class Blur(Pass):
    """Scores move by a factor."""

    name: ClassVar[str] = "blur"
    contract: ClassVar = "lossy"
    by: float = 0.9

    def run(self, program):
        key = next(iter(program.weights))
        program.weights[key] = program.weights[key] * self.by
        changes = Changes(figures=[Figure("a", "sqnr dB", 3.0), Figure("b", "sqnr dB", 1.0)])
        changes.apply("blur", key)
        changes.note("everything is blurred")
        return changes


@dataclass(frozen=True)
class Idle(Pass):
    name: ClassVar[str] = "idle"
    contract: ClassVar = "exact"

    def run(self, program):
        return Changes()


def test_even_scores_give_the_size_of_the_vocabulary():
    made = bigram(torch.full((VOCABULARY, VOCABULARY), 7.0))

    assert quality.perplexity(made, samples()) == pytest.approx(VOCABULARY)


def test_perplexity_is_that_of_the_formula():
    table, data = tables()[0], samples()
    last, following = pairs(data)
    expected = F.cross_entropy(table.double()[last], following).exp().item()

    assert quality.perplexity(bigram(table), data) == pytest.approx(expected, rel=1e-12)


def test_comparison_is_that_of_the_formulas():
    (first, second), data = tables(), samples()
    last, following = pairs(data)
    old, new = (F.log_softmax(t.double(), -1)[last] for t in (first, second))

    found = quality.compare(bigram(first), bigram(second), iter(data))

    losses = [-t.gather(1, following[:, None]).mean() for t in (old, new)]
    assert found.perplexity_before == pytest.approx(losses[0].exp().item(), rel=1e-12)
    assert found.perplexity == pytest.approx(losses[1].exp().item(), rel=1e-12)
    assert found.kl == pytest.approx(F.kl_div(new, old, reduction="batchmean", log_target=True).item(), rel=1e-9)
    assert found.agreement == pytest.approx((old.argmax(-1) == new.argmax(-1)).double().mean().item())
    assert found.positions == len(last)
    assert 0 < found.agreement < 1


def test_identical_programs_do_not_differ():
    made = bigram(tables()[0])

    found = quality.compare(made, made.clone(), samples())

    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.perplexity == found.perplexity_before


def test_forbidden_tokens_do_not_spoil_the_comparison():
    table, data = tables()[0], samples()
    table[:, 3] = -math.inf
    data = tuple({"x0": s["x0"].masked_fill(s["x0"] == 3, 4)} for s in data)
    changed = table + 0.1 * torch.randn_like(table)

    found = quality.compare(bigram(table), bigram(changed), data)

    assert 0 < found.kl < 1
    assert quality.compare(bigram(torch.zeros_like(table)), bigram(table), data).kl == math.inf
    moved = measure.measure(bigram(table), {"forward": {"y0": table[None]}}, {"forward": {"y0": changed[None]}})
    assert 0 < moved[0].next_token.kl < 1
    assert 0 < moved[0].error < 1


def test_scores_that_are_no_numbers_are_not_hidden():
    rows = torch.tensor([[0.0, math.nan], [0.0, 1.0]])

    assert quality.kl_rows(rows, rows).isnan().tolist() == [True, False]
    assert quality.kl_rows(rows[1:], rows[:1]).isnan().all()


def test_padded_tokens_do_not_count():
    table = tables()[0]
    made = program(
        lambda ids, mask, table: F.embedding(ids, table) + 0 * mask[..., None],
        *(torch.ones(2, 6, dtype=torch.int64) for _ in range(2)), weights={"table": table}, axes=lambda x: range(2),
    )  # fmt: skip
    node = made.main.placeholders("input")[1]
    node.meta["bind"] = type(node.meta["bind"])("input", "attention_mask")
    made.info["kind"] = "causal-lm"
    ids, mask = torch.randint(VOCABULARY, (1, 6)), torch.tensor([[0, 1, 1, 1, 0, 0]])

    found = quality.perplexity(made, [{"x0": ids, "attention_mask": mask}])

    assert found == pytest.approx(quality.perplexity(bigram(table), [{"x0": ids[:, 1:4]}]))


def test_a_model_without_next_token_has_no_perplexity():
    made = bigram(tables()[0])
    made.info["kind"] = "encoder"

    assert language_model(made) is None
    with pytest.raises(CompileError, match="scores no next token"):
        quality.perplexity(made, samples())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "odd-names"])
def test_rounded_caches_count(name):
    """`prefill` reads keys and values before they are rounded; the measurement reads them after."""
    case = zoo.case(name)
    made = sv.trace(case.model, case.inputs)
    data = [{key: ids[:, :7]} for key, ids in case.inputs.items()]

    plain = quality.compare(made, made.clone(), data)
    rounded = quality.compare(made, Pipeline((QuantizeCache(),))(made), data)

    logits = case.model(**case.inputs)
    expected = (logits if isinstance(logits, torch.Tensor) else logits.logits).double()[:, :6].flatten(0, 1)
    wanted = data[0][next(iter(data[0]))][:, 1:].flatten()
    assert plain.perplexity == pytest.approx(F.cross_entropy(expected, wanted).exp().item(), rel=1e-4)
    assert plain.kl == 0.0
    assert 0 < rounded.kl < 1e-2


def test_ledger_compares_lossy_passes_with_the_program_before_the_first():
    table = tables()[0]
    made, (fit, held) = bigram(table), samples((2, 9), (1, 40))
    made.calibration = Calibration((fit,), (held,))

    result, ledger = Pipeline((Idle(), Blur(), Idle(), Blur(by=0.5))).run(made)

    rows = [row.quality for row in ledger.rows]
    assert [len(found) for found in rows] == [0, 2, 0, 2]
    assert [(j.data, j.quality) for j in rows[3]] == [
        ("calibration", quality.compare(made, result, [fit])),
        ("held-out", quality.compare(made, result, [held])),
    ]
    for first, second in zip(rows[1], rows[3], strict=True):
        assert first.change == first.quality.perplexity - first.quality.perplexity_before
        assert second.change == second.quality.perplexity - first.quality.perplexity


def test_without_calibration_nothing_is_judged():
    _, ledger = Pipeline((Blur(),)).run(bigram(tables()[0]))

    assert ledger.rows[0].quality == ()


def test_ledger_shows_quality_notes_and_figures():
    made = bigram(tables()[0])
    made.calibration = Calibration(samples((1, 9)))
    _, ledger = Pipeline((Blur(),)).run(made)

    text = str(ledger)
    assert "blur: against float on calibration data: perplexity" in text
    assert "held-out" not in text
    assert "blur: everything is blurred" in text
    assert "blur: sqnr dB: 1 at b, median 2, 3 at a" in text
    (row,) = json.loads(ledger.to_json())
    assert row["quality"][0]["quality"]["positions"] == 8
    assert row["notes"] == ["everything is blurred"]
    assert row["figures"][1] == {"where": "b", "name": "sqnr dB", "value": 1.0}


def test_a_lone_figure_is_its_own_summary():
    assert summaries([Figure("head", "error", 0.25)]) == ["error: 0.25 at head"]


def test_other_models_are_compared_by_their_outputs():
    made = program(lambda x, w: (x @ w, (x @ w).argmax(-1)), torch.randn(3, 4), weights={"w": torch.randn(4, 5)})
    made.calibration = Calibration(({"x0": torch.randn(2, 4)}, {"x0": torch.randn(6, 4)}))

    _, ledger = Pipeline((Blur(by=1.25), Blur(by=-1.0))).run(made)

    (first,), (second,) = (row.quality for row in ledger.rows)
    assert [d.output for d in first.drifts] == ["y0"]
    assert first.drifts[0].error == pytest.approx(0.25, rel=1e-6)
    assert first.drifts[0].cosine == pytest.approx(1.0)
    assert second.drifts[0].error == pytest.approx(2.25, rel=1e-6)
    assert second.drifts[0].cosine == pytest.approx(-1.0)
    assert second.change == pytest.approx(2.0, rel=1e-6)
    assert "y0 moved by 2.5e-01 (relative, Euclidean), cosine 1.000000; this pass +0.25" in str(ledger)


def test_an_output_that_became_infinite_is_infinitely_far():
    x = torch.tensor([[1.0, 0.0, 2.0, 4.0]])
    before = program(lambda x, w: x / w, x, weights={"w": torch.ones(4)})
    after = before.clone()
    after.weights[next(iter(after.weights))] = torch.tensor([1.0, 1.0, 0.0, 1.0])

    (found,) = quality.drift(before, after, [{"x0": x}])

    assert found.error == math.inf
