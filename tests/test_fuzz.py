"""The fuzzer: a short campaign of a fixed seed finds nothing, and what is planted is found and made small."""

from __future__ import annotations

import math
import operator
from random import Random

import pytest
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import TRANSLATIONS
from sylvester.codegen.lowering import LOWERINGS
from sylvester.compiler.program import value
from tests.fuzz import graphs
from tests.fuzz.campaign import Campaign, Options, checked, replay
from tests.fuzz.graphs import Graph, Model, Ref, Size, Source, Step, build
from tests.fuzz.grow import Growth, Rejected, grow, require_sound
from tests.fuzz.known import FINITE_ONLY, KNOWN
from tests.fuzz.native import refusal
from tests.fuzz.onnx import KINDS
from tests.fuzz.records import lowered, records
from tests.fuzz.shrink import shrink
from tests.fuzz.values import Mismatch, expected
from tests.sampling import SIZES, Sample

aten, dialect = torch.ops.aten, torch.ops.sylvester
QUICK = Options(seed=0, bundle=12, trace_every=6, passes=4, shrinking=20)


def product() -> Graph:
    """A product among other calls."""
    x, y = Source(Sample(("n", 3)), 1), Source(Sample((3,)), 2)
    steps = (
        Step(aten.tanh.default, (Ref(0),), {}),
        Step(aten.mul.Tensor, (Ref(2), Ref(1)), {}),
        Step(aten.exp.default, (Ref(3),), {}),
        Step(aten.sum.dim_IntList, (Ref(4), [1]), {}),
    )
    return Graph((x, y, *steps), (2, 5))


def test_a_short_campaign_finds_nothing() -> None:
    campaign = Campaign(QUICK)
    campaign.run(graphs=QUICK.bundle)

    found = [f"{f.oracle}: {f.message}\n{f.test}" for f in campaign.failures.values() if not f.reason]
    assert not found, "\n\n".join(found)
    assert campaign.graphs >= 0.9 * QUICK.bundle
    assert len(campaign.ops) > 60
    assert campaign.counts["checks: native"] > 1.5 * QUICK.bundle
    assert campaign.counts["onnx standard: run"] == campaign.counts["onnx ort: run"] > QUICK.bundle


def test_a_seed_stands_for_its_graphs() -> None:
    first, again, other = (grow(Random(seed)).text() for seed in ("0:3", "0:3", "0:4"))

    assert first == again != other


def test_most_lowered_ops_are_drawn_soon() -> None:
    found = {step.target for number in range(40) for step in grow(Random(f"1:{number}")).steps}

    assert len(found & lowered()) > 0.5 * len(lowered())


def test_every_lowered_op_has_a_record() -> None:
    recorded = {call.target for known in records().values() for r in known for call in r.calls}

    assert sorted(str(op) for op in lowered() - recorded - {operator.getitem}) == []


def test_the_text_of_a_graph_makes_it_again() -> None:
    graph = grow(Random("0:5"))
    scope = {"torch": torch, "math": math, "operator": operator, "Sample": Sample, **vars(graphs)}

    assert eval(graph.text(), scope) == graph


def test_a_planted_error_of_a_kernel_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LOWERINGS[aten.mul.Tensor]
    add = LOWERINGS[aten.add.Tensor]
    monkeypatch.setitem(LOWERINGS, aten.mul.Tensor, add)
    with pytest.raises(Mismatch, match="elements differ"):
        replay("native", product())
    monkeypatch.setitem(LOWERINGS, aten.mul.Tensor, plain)
    replay("native", product())


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_error_of_an_onnx_form_is_found(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    replay(f"onnx-{kind}", product())
    wrong = {**TRANSLATIONS, aten.mul.Tensor: TRANSLATIONS[aten.add.Tensor]}
    monkeypatch.setattr("sylvester.backends.onnx.translate.TRANSLATIONS", wrong)
    with pytest.raises(Mismatch, match=f"onnx {kind}, turn 0"):
        replay(f"onnx-{kind}", product())


def test_caches_and_weights_of_few_bits_are_met() -> None:
    """What makes them is read by something, or no output would need them."""
    rare = {dialect.kv_update_q.default, dialect.dequantize_w4.default}
    found = {step.target for number in range(150) for step in grow(Random(f"7:{number}")).steps}

    assert rare <= found


@pytest.mark.nightly
def test_shrinking_leaves_the_call_at_fault() -> None:
    small = shrink(product(), lambda g: any(s.target is aten.mul.Tensor for s in g.steps), 20)

    assert [step.target for step in small.steps] == [aten.mul.Tensor]
    assert len(small.nodes) == 3


def test_sizes_that_the_facts_rule_out_are_not_run() -> None:
    """A reshape to [5, -1] of n x 5 only fits when its guard, n = 5, holds."""
    x = Source(Sample(("n", 6)), 1)
    free = Graph((x, Step(aten.reshape.default, (Ref(0), [Size(0, 0), 2, 3]), {})), (1,))
    fixed = Graph((x, Step(aten.add.Tensor, (Ref(0), Ref(2)), {})), (1,))
    fixed = Graph((x, Source(Sample((5, 6)), 2), Step(aten.add.Tensor, (Ref(0), Ref(1)), {})), (2,))

    assert build(free).turns == (0, 1, 2)
    assert build(fixed).turns[0] == 0
    assert 1 not in build(fixed).turns


def test_what_rounding_decides_is_not_compared() -> None:
    """floor(3 (x / 3)) of x = 1 or 2: rounding may fall below x; x + 1 is compared."""
    x = Source(Sample(("n", 3), "integer", 1, 3), 1)
    steps = (
        Step(aten.div.Tensor, (Ref(0), 3), {}),
        Step(aten.mul.Tensor, (Ref(1), 3), {}),
        Step(aten.floor.default, (Ref(2),), {}),
        Step(aten.add.Tensor, (Ref(0), 1), {}),
    )
    case = build(Graph((x, *steps), (3, 4)))
    wanted = expected(case.program, case.inputs(0))

    floor, sure = wanted["y3"], wanted["y4"]
    floor.require((floor.exact - 1).float(), "floor")
    with pytest.raises(Mismatch, match="15 of 15 elements differ"):
        sure.require(sure.exact - 1, "sum")


def test_a_check_that_fixes_a_size_fails() -> None:
    case = build(product())
    with pytest.raises(Mismatch, match="sizes were fixed"):
        checked(lambda given: int(value(given.entry.placeholders("input")[0]).shape[0]), case)


def test_calls_that_nothing_defines_are_rejected() -> None:
    growth = Growth(Random(0))
    x = growth.source(Sample(("n", 3)))
    step = Step(aten.log.default, (x,), {})

    with pytest.raises(Rejected, match="not finite"):
        require_sound(step, [growth.values[0][0]], torch.tensor([1.0, math.nan]))
    with pytest.raises(Rejected, match="huge"):
        require_sound(step, [growth.values[0][0]], torch.tensor([1e9]))


def test_known_failures_have_reasons() -> None:
    assert all(k.text and len(k.reason) > 20 for k in KNOWN)
    names = list(records())
    assert all(any(name.startswith(begin) for name in names) for begin in FINITE_ONLY)


def test_a_module_is_its_graph() -> None:
    graph = product()
    case = build(graph)
    found: tuple[Tensor, ...] = Model(graph)(*case.inputs(0).values())

    torch.testing.assert_close(list(found), list(case.program.run("forward", case.inputs(0)).values()))
    assert refusal(case.program) is None
    assert [value(n).dim() for n in case.entry.results()] == [2, 1]
    assert SIZES[0]["n"] == found[0].shape[0]
