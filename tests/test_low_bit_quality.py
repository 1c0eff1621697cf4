"""End to end on trained models: what rotations and equalised channels are worth at low bits, on held-out text."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM

import sylvester as sv
from benchmarks.quality.injection import inject
from benchmarks.quality.recipes import HELD, MODEL, SCALED, windows
from examples.semantic_search import model_folder
from sylvester.compiler import quality
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.samples import parse
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.rotate_hadamard import RotateHadamard

WINDOWS, SEEDS = 3, (0, 1, 2)
W4A4, W8A8 = Quantize(weights=4, activations=4), Quantize(weights=8)

pytestmark = pytest.mark.nightly


class Trained:
    """The shipped model, maybe with outliers; perplexities relative to float, means over seeds of the rotations."""

    def __init__(self, factor: float) -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        inject(model, factor)
        self.program = sv.trace(model, (torch.zeros((2, 64), dtype=torch.long),))
        self.samples = windows(HELD.read_text(encoding="utf-8"), WINDOWS)
        self.exact = quality.perplexity(self.program, self.samples)

    def plain(self, step):
        return self._relative(step)

    def rotated(self, step, *before):
        return mean(self._relative(*before, RotateHadamard(seed=seed), step) for seed in SEEDS)

    def _relative(self, *passes):
        changed = Pipeline(passes, check=False)(self.program)
        return quality.perplexity(changed, self.samples) / self.exact


@pytest.fixture(scope="module")
def trained():
    return Trained(1.0)


@pytest.fixture(scope="module")
def outliers():
    return Trained(30.0)


def test_injected_outliers_do_not_change_the_function(trained, outliers):
    assert outliers.exact == pytest.approx(trained.exact, rel=1e-4)


def test_rotations_lower_the_loss_of_w4a4(trained):
    assert trained.rotated(W4A4) < min(1.15, trained.plain(W4A4))


def test_rotations_take_outliers_away_and_equalised_channels_the_rest(outliers):
    plain, rotated = outliers.plain(W4A4), outliers.rotated(W4A4)
    assert rotated < 0.7 * plain
    assert outliers.rotated(W4A4, *SCALED) < min(1.15, rotated)


def test_w8a8_is_near_float(trained):
    assert trained.plain(W8A8) < 1.005
    assert trained.rotated(W8A8) < 1.005


def test_int8_attention_is_near_float(trained):
    assert 1 != trained.plain(QuantizeAttention(products="int8", cosine=0.5)) < 1.01


def test_a_trained_encoder_with_norms_after_its_sums_is_rotated_by_itself():
    program = sv.trace(str(model_folder()))
    lines = [line for line in HELD.read_text(encoding="utf-8").splitlines() if len(line) > 200][:4]
    samples = parse(program, lines).fit
    rotated, ledger = Pipeline((RotateHadamard(),)).run(program)
    assert ledger.rows[0].error < 1e-5
    assert set(ledger.rows[0].changes.counts()) == {"inputs", "values", "ffn"}

    errors = [
        max(d.error for d in quality.drift(program, Pipeline((W8A8,), check=False)(p), samples))
        for p in (program, rotated)
    ]
    assert errors[1] < 0.7 * errors[0]
