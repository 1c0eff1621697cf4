"""Budgets: every form of every field, and an error that says what was found and what is taken."""

from __future__ import annotations

import math

import pytest

import sylvester as sv
from sylvester.compiler.budget import Budget, shown


@pytest.mark.parametrize(
    ("given", "found"),
    [(40_000_000, 4e7), ("40MB", 4e7), ("1.5 GB", 1.5e9), ("512KiB", 2**19), ("2 mib", 2**21), (".5kB", 500), ("7", 7)],
)
def test_sizes(given, found):
    assert Budget(size=given).size == found
    assert Budget(memory=given).memory == found


@pytest.mark.parametrize(
    ("given", "found"), [(0.03, 0.03), ("30ms", 0.03), ("30ms/token", 0.03), ("1.5 s", 1.5), ("250us", 2.5e-4)]
)
def test_latencies(given, found):
    assert Budget(latency=given).latency == pytest.approx(found)


@pytest.mark.parametrize(("given", "found"), [(0.05, 0.05), ("5%", 0.05), ("0.05", 0.05), (0, 0)])
def test_increases(given, found):
    assert Budget(max_perplexity_increase=given).max_perplexity_increase == pytest.approx(found)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": "40 parsecs"}, ["size is '40 parsecs'", "'40MB'"]),
        ({"size": "30ms"}, ["size is '30ms'", "KiB"]),
        ({"latency": "40MB"}, ["latency is '40MB'", "'30ms/token'"]),
        ({"size": "40MB/token"}, ["size is '40MB/token'"]),
        ({"memory": -3}, ["memory is -3", "more than 0"]),
        ({"size": "-40MB"}, ["size is '-40MB'", "more than 0"]),
        ({"latency": math.nan}, ["latency is nan", "finite"]),
        ({"latency": 0}, ["latency is 0", "more than 0"]),
        ({"max_kl": "5%"}, ["max_kl is '5%'", "nats"]),
        ({"max_kl": -0.1}, ["max_kl is -0.1", "0 or more"]),
        ({"max_perplexity_increase": "five"}, ["max_perplexity_increase is 'five'", "'5%'"]),
        ({"size": True}, ["size is True"]),
        ({"size": [1]}, ["size is [1]"]),
        ({}, ["the budget is empty", "max_perplexity_increase"]),
    ],
)
def test_bad_values_say_what_was_found_and_what_is_taken(fields, words):
    with pytest.raises(ValueError, match="expected") as caught:
        Budget(**fields)
    assert all(word in str(caught.value) for word in words)


def test_text_and_mapping():
    expected = Budget(size=4e7, latency=0.005)
    assert Budget.parse("size=40MB, latency=5ms") == expected
    assert Budget.parse({"size": "40MB", "latency": 0.005}) == expected
    assert Budget.parse(expected) is expected
    assert str(expected) == "budget(size=40 MB, latency=5 ms)"
    assert shown("max_perplexity_increase", 0.05) == "5.000%"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sizes=40MB", ["no field 'sizes'", "did you mean 'size'?"]),
        ("size", ["'size'", "field=value"]),
        ("size=forty", ["size is 'forty'", "'40MB'"]),
        ("", ["the budget is empty"]),
        (40, ["budget is a int", "sv.Budget(size='40MB')"]),
    ],
)
def test_what_is_no_budget_is_an_error(given, words):
    with pytest.raises(sv.CompileError) as caught:
        Budget.parse(given)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert all(word in said for word in words)


def test_an_unknown_field_is_named():
    with pytest.raises(TypeError, match="sizes"):
        sv.Budget(sizes=3)
