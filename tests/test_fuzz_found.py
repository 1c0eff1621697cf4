"""Graphs that the fuzzer found something with, as it printed them."""

from __future__ import annotations

from random import Random

import pytest
import torch

from tests.fuzz.campaign import replay
from tests.fuzz.graphs import Graph, Ref, Size, Source, Step
from tests.fuzz.grow import grow
from tests.fuzz.onnx import KINDS
from tests.sampling import Sample

aten = torch.ops.aten


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_over_an_open_width_stays_open(kind: str) -> None:
    """Ones of the size of the example made the size of every call that of the example."""
    x = Source(Sample((2, 3, "n")), 4066)
    replay(f"onnx-{kind}", Graph((x, Step(aten.layer_norm.default, (Ref(0), [Size(0, 2)]), {})), (1,)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_to_an_open_size_is_refused(kind: str) -> None:
    """PyTorch's RuntimeError about sizes that are no numbers ended a campaign."""
    sources = Source(Sample((2, 3, 6)), 1), Source(Sample(("n", 2)), 2)
    call = Step(aten.adaptive_avg_pool1d.default, (Ref(0), [Size(1, 0)]), {})
    graph = Graph((*sources, call, Step(aten.neg.default, (Ref(1),), {})), (2, 3))

    replay(f"onnx-{kind}", graph)


def test_a_table_of_an_open_size_stays_open() -> None:
    """Reading calibration data asked how many rows the table has."""
    ids, table = Source(Sample(("n", 2), kind="integer", high=2), 4525), Source(Sample(("n", 2)), 3)
    look_up, squeeze = Step(aten.embedding.default, (Ref(1), Ref(0)), {}), Step(aten.squeeze.dim, (Ref(3), 1), {})

    replay("exact", Graph((ids, table, look_up, Source(Sample(("n", 1, 3)), 1805), squeeze), (2, 4)))


def test_rounding_may_take_all_that_a_sum_leaves() -> None:
    """1 + erf(x) of a small x is 0 in float32 and not in float64, so that it is not counted."""
    x = Source(Sample(("n", 2), kind="uniform", low=-9, high=-4), 1)
    steps = (Step(aten.erf.default, (Ref(0),), {}), Step(aten.add.Tensor, (Ref(1), 1.0), {}))

    replay("meaning", Graph((x, *steps, Step(aten.count_nonzero.default, (Ref(2),), {})), (3,)))


def test_rounding_may_pass_a_threshold() -> None:
    """A sum just below 0.1 is clamped to 0.1, unless bfloat16 takes it above: no small move tells."""
    x = Source(Sample(("n", "m", 6), low=-9, high=10), 2237)
    bias = Source(Sample((37,), kind="short", weight=True, dtype=torch.float32), 3942)
    weight = Source(Sample((37, 6), kind="short", weight=True, dtype=torch.bfloat16), 7606)
    layer = Step(torch.ops.sylvester.linear_bf16.default, (Ref(0), Ref(2), Ref(1)), {})

    replay("native", Graph((x, bias, weight, layer, Step(aten.clamp_min.default, (Ref(3), 0.1), {})), (4,)))


@pytest.mark.parametrize("kind", ["native", *(f"onnx-{kind}" for kind in KINDS)])
def test_errors_of_one_row_belong_together(kind: str) -> None:
    """All outputs of a layer read the same rounded row: their variance moves by more than independent errors do."""
    weight = Source(Sample((16, 8), kind="short", weight=True, dtype=torch.bfloat16), 5828)
    steps = (
        Step(aten.sin.default, (Ref(0),), {}),
        Step(aten.softplus.default, (Ref(2),), {}),
        Step(torch.ops.sylvester.linear_bf16.default, (Ref(3), Ref(1), None), {}),
        Step(aten.var.default, (Ref(4), False), {}),
    )

    replay(kind, Graph((Source(Sample((1, 8)), 3975), weight, *steps), (5,)))


@pytest.mark.nightly
def test_queries_of_one_head_meet_every_head_of_the_keys() -> None:
    """Compiled code gave zeros; over caches of 4 bits it divided by 0."""
    q, k = Source(Sample((2, 1, 3, 8)), 1), Source(Sample((2, 4, 5, 8)), 2)
    call = Step(torch.ops.sylvester.attention.default, (Ref(0), Ref(1), Ref(1), None, None, 0.35, False, 0), {})

    replay("native", Graph((q, k, call), (2,)))


def test_a_rotation_is_held_to_finite_values_only() -> None:
    x, weight = Source(Sample(("n", 32, 2), kind="edges"), 9693), Source(Sample((6, 2), weight=True), 8534)
    steps = (Step(aten.round.default, (Ref(0),), {}), Step(aten.linear.default, (Ref(2), Ref(1)), {}))

    replay("pass rotate-hadamard", Graph((x, weight, *steps), (3,)))


def test_weights_have_one_size() -> None:
    graphs = [grow(Random(f"12:{number}")) for number in range(30, 60)]
    assert all(not {"n", "m"} & set(s.shape) for graph in graphs for s in graph.sources.values() if s.weight)
