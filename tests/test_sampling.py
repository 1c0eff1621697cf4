"""Sampling: what each option leaves of the probabilities, and that draws follow them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from sylvester.compiler.sampling import Sampling

NONE = np.empty((1, 0), np.int64)


def test_sampled_frequencies_follow_the_logits():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    random = np.random.default_rng(0)

    drawn = Sampling(temperature=1.0).pick(np.repeat(logits, 4000, 0), NONE, random.random(4000))

    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.1), [1, 0, 0, 0]),
        (Sampling(0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
        (Sampling(1e-310), [1, 0, 0, 0]),
        (Sampling(0), [1, 0, 0, 0]),
    ],
)
def test_sampling_probabilities(sampling, expected):
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))

    np.testing.assert_allclose(sampling.probabilities(logits, NONE)[0], expected, atol=1e-9)


@pytest.mark.parametrize("vocabulary", [1, 7, 199, 4096])
@pytest.mark.parametrize(
    ("penalty", "temperature", "k", "p"), list(product((1.0, 1.5, 0.7), (0.5, 3.0), (None, 1, 50), (None, 0.5, 0.999)))
)
def test_probabilities_are_those_of_hugging_face(vocabulary, penalty, temperature, k, p):
    """Half of the scores are rounded, so that some are equal."""
    random = np.random.default_rng(vocabulary)
    logits = 4 * random.normal(size=(2, vocabulary)).astype(np.float32)
    logits[1] = logits[1].round()
    tokens = random.integers(0, vocabulary, (2, 12))

    found = Sampling(temperature, k, p, penalty).probabilities(logits, tokens)

    made = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature)]
    made += [hf.TopKLogitsWarper(k)] if k else []
    made += [hf.TopPLogitsWarper(p)] if p else []
    scores = torch.tensor(logits)
    for process in made:
        scores = process(torch.tensor(tokens), scores)
    expected = scores.double().softmax(-1).numpy()
    rows = slice(1) if p else slice(2)
    np.testing.assert_allclose(found[rows], expected[rows], atol=1e-6)


def test_draws_come_as_often_as_their_chances():
    """Chi-square of 3 degrees of freedom, 0.1 %."""
    chances = np.array([0.5, 0.3, 0.15, 0.05])
    uniform = np.random.default_rng(0).random(20000)
    logits = np.broadcast_to(np.log(chances), (len(uniform), 4))

    found = np.bincount(Sampling(1.0).pick(logits, np.zeros((len(uniform), 0), np.int64), uniform), minlength=4)

    assert (
        (found - chances * len(uniform)) ** 2 / (chances * len(uniform))
    ).sum() < 16.3


def test_equal_numbers_draw_alike_from_scores_that_are_alike():
    """As often as the distributions overlap, or nearly: maximal coupling would give 1 - half of |p - q| summed."""
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(2000, 500))
    other = logits + 0.1 * random.normal(size=logits.shape)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, other))
    uniform, none = random.random(2000), np.zeros((2000, 0), np.int64)

    same = (Sampling(1.0).pick(logits, none, uniform) == Sampling(1.0).pick(other, none, uniform)).mean()

    assert same > 1 - 1.5 * (np.abs(p - q).sum(-1) / 2).mean() * 4 / 3


def test_what_is_left_out_is_never_drawn():
    logits = np.array([[-np.inf, 1.0, -np.inf, 0.0, -np.inf]], np.float32)
    numbers = [np.array([n]) for n in (0.0, *np.random.default_rng(0).random(40), 1 - 2**-53)]

    for sampling in (Sampling(1.0), Sampling(1.0, top_k=4), Sampling(1.0, top_p=1.0)):
        assert {int(sampling.pick(logits, NONE, u)[0]) for u in numbers} == {1, 3}
