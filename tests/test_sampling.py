"""Sampling: what each option leaves of the probabilities, and that draws follow them."""

from __future__ import annotations

import numpy as np
import pytest

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
