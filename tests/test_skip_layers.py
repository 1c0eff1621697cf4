"""Layers left out while decoding or everywhere; parts of layers; depth by position."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

import sylvester as sv
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import find_layers
from sylvester.compiler.next_token import empty_state
from sylvester.compiler.ops import attention
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.stages import DECODE
from sylvester.compiler.verify import verify
from sylvester.passes import DepthSchedule, DropSublayers, RotateHadamard, SkipLayers
from sylvester.passes.skip_rules import depths, kept_paper, kept_similar, kept_uniform
from tests import zoo
from tests.depth_cases import decoded, ids, rewritten, traced, with_layers

CPU = sv.Target("cpu", isas=("avx2",))


@pytest.mark.parametrize(
    ("layers", "speedup", "kept"),
    [
        (30, 2, [*range(0, 28, 2), 29]),
        (30, 3, [*range(0, 25, 3), 29]),
        (30, 5, [0, 6, 12, 18, 24, 29]),
        (30, 10, [0, 15, 29]),
        (12, 2, [0, 2, 4, 6, 8, 11]),
        (12, 3, [0, 4, 8, 11]),
    ],
)
def test_the_rule_of_the_paper(layers, speedup, kept):
    assert kept_paper(layers, speedup) == kept


@pytest.mark.parametrize("layers", [12, 24, 30, 32, 40])
@pytest.mark.parametrize("speedup", [1.25, 1.5, 2, 3, 5, 6])
def test_the_uniform_rule_keeps_as_many_without_large_gaps(layers, speedup):
    kept, wanted = kept_uniform(layers, speedup), int(layers // speedup)

    assert len(set(kept)) == wanted
    assert (kept[0], kept[-1]) == (0, layers - 1)
    assert max(b - a for a, b in pairwise(kept)) <= -(-(layers - 1) // (wanted - 1))


def test_the_rule_by_similarity_drops_what_turns_the_stream_least():
    assert kept_similar([0.1, 0.9, 0.2, 0.8, 0.99], 5 / 3) == [0, 2, 4]


@pytest.mark.parametrize("name", zoo.DIVERSE)
def test_decoding_equals_a_model_of_the_kept_layers(name):
    tokens = ids()
    count = zoo.case(name).blocks
    program = rewritten(name, SkipLayers(layers=(1, 2)))
    kept = [n for n in range(count) if n not in (1, 2)]

    verify(program)
    torch.testing.assert_close(decoded(program, tokens), with_layers(name, kept, tokens), rtol=1e-4, atol=1e-4)
    assert [len(program.entries[e].calls(attention.target)) for e in ("prefill", DECODE)] == [count, len(kept)]
    assert len(program.state) == 2 * len(kept)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi"])
def test_prompts_are_read_by_all_layers_into_the_caches_that_are_left(name):
    tokens = ids()
    whole, program = traced(name), rewritten(name, SkipLayers(speedup=2))
    key = next(iter(whole.entries["prefill"].examples))

    found, expected = (
        p.run("prefill", {key: tokens}, empty_state(p, p.entries["prefill"], {key: tokens})) for p in (program, whole)
    )

    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=0)
    for new, old in (("k0", "k0"), ("v1", "v3")):  # of four layers the first and the last are kept
        torch.testing.assert_close(found[new], expected[old], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "vit", "t5", "resnet", "torch-decoder", "llama-tied"])
def test_layers_can_go_for_good(name):
    before = traced(name)
    program = rewritten(name, SkipLayers(layers=(1,), phase="all"))

    verify(program)
    assert len(find_layers(program)) == len(find_layers(before)) - 1
    assert program.weights.nbytes < before.weights.nbytes
    assert [layer.original for layer in find_layers(program)][:2] == [0, 2]


def test_bert_without_a_layer_equals_the_eager_model():
    case = zoo.case("bert")
    program = rewritten("bert", SkipLayers(layers=(1, 2), phase="all"))

    found = program.run("forward", case.inputs)["last_hidden_state"]

    model = copy.deepcopy(case.model)
    model.encoder.layer = torch.nn.ModuleList([model.encoder.layer[n] for n in (0, 3)])
    with torch.no_grad():
        torch.testing.assert_close(found, model(**case.inputs).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_speedup_of_one_changes_nothing():
    tokens = ids()

    same = rewritten("llama-gqa", SkipLayers(speedup=1))
    assert torch.equal(decoded(same, tokens), decoded(traced("llama-gqa"), tokens))


def test_generation_is_that_of_the_reference_and_caches_are_smaller():
    tokens = ids(5)
    steps = (SkipLayers(speedup=2),)
    with sv.compile(traced("llama-gqa"), passes=steps, target="reference") as reference:
        expected = reference.generate(tokens, 20)
    with sv.compile(traced("llama-gqa"), passes=steps, target=CPU) as compiled:
        assert torch.equal(compiled.generate(tokens, 20), expected)
        assert len(compiled.manifest.state) == 4
        assert "2 of 4 layers skipped: [1, 2]" in compiled.ledger


def test_similarity_needs_data_and_says_so():
    with pytest.raises(CompileError, match="measured on calibration data"):
        rewritten("llama-gqa", SkipLayers(speedup=2, rule="similarity"))


def test_layers_are_skipped_after_rotations_too():
    tokens = ids()
    plain = rewritten("llama-gqa", SkipLayers(speedup=2))
    rotated = rewritten("llama-gqa", RotateHadamard(), SkipLayers(speedup=2))

    torch.testing.assert_close(decoded(rotated, tokens), decoded(plain, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either speedup or layers"),
        ({"speedup": 2, "layers": (1,)}, "either speedup or layers"),
        ({"speedup": 0.5}, "a number of 1 or more"),
        ({"speedup": 1.5, "rule": "paper"}, "for a speedup of 2 or more"),
        ({"speedup": 2, "rule": "best"}, "rule is 'best', expected one of"),
        ({"speedup": 2, "phase": "prefill"}, "phase is 'prefill'"),
        ({"layers": (1, 1)}, "distinct numbers"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SkipLayers(**options)


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("llama-gqa", SkipLayers(layers=(4,)), "layers names layer 4, the program has layers 0 to 3"),
        ("llama-gqa", SkipLayers(speedup=3), "speedup=3 is not reachable: the first and the last of 4 layers"),
        ("bert", SkipLayers(speedup=2), "phase='decode' needs an entry 'decode'"),
        ("mlp", SkipLayers(speedup=2, phase="all"), "no repeated residual blocks"),
        ("llama-gqa", SkipLayers(layers=(0, 1, 2, 3), phase="all"), "all 4 layers would go"),
        ("llama-gqa", DropSublayers(ffn=(9,)), "ffn names layer 9"),
        ("llama-gqa", DepthSchedule(min_layers=5), "min_layers is 5, the program has 4 layers"),
    ],
)
def test_what_a_program_does_not_allow_is_an_error(name, step, message):
    with pytest.raises(CompileError, match=message):
        rewritten(name, step)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi"])
def test_dropped_parts_are_gone_and_nothing_else(name):
    before, program = traced(name), rewritten(name, DropSublayers(attention=(1,), ffn=(2,)))

    count = len(before.entries[DECODE].calls(attention.target))
    assert len(program.entries[DECODE].calls(attention.target)) == count - 1
    assert len(program.entries["start"].calls(attention.target)) == count - 1
    assert len(program.state) == 2 * (count - 1)
    assert set(program.weights) < set(before.weights)
    assert all(program.weights[key] is before.weights[key] for key in program.weights)
    assert program.info["skipped"]["all"] == {"attention": [1], "ffn": [2]}


def test_dropping_both_parts_is_dropping_the_layer():
    tokens = ids()
    parts = rewritten("llama-gqa", DropSublayers(attention=(1,), ffn=(1,)))
    layer = rewritten("llama-gqa", SkipLayers(layers=(1,), phase="all"))

    assert torch.equal(decoded(parts, tokens), decoded(layer, tokens))
    assert parts.info["layers"] == layer.info["layers"] == [0, 2, 3]


def test_a_layer_without_such_a_part_is_refused_with_a_reason():
    program, ledger = Pipeline((DropSublayers(ffn=(0,), attention=(0,)),)).run(traced("resnet"))

    refused = {r.reason for r in ledger.rows[0].changes.refused}
    assert refused == {f"it has no {part} in 'forward', its parts are ['conv']" for part in ("attention", "ffn")}
    assert len(find_layers(program)) == 5


@pytest.mark.parametrize(("most", "least", "length", "variants"), [(16, 8, 512, 4), (32, 8, 100, 4), (24, 12, 64, 3)])
def test_depth_falls_and_its_mean_is_that_of_the_decay(most, least, length, variants):
    steps = depths(most, least, length, variants)

    layers = [next(d for at, d in reversed(steps) if at <= t) for t in range(length)]
    assert layers == sorted(layers, reverse=True)
    assert len(steps) <= variants
    assert abs(sum(layers) / length - (most + least) / 2) < 1


def test_later_stages_run_fewer_layers_over_caches_that_earlier_ones_wrote():
    program = rewritten("llama-gqa", DepthSchedule(min_layers=2, length=12))

    entries = [stage["entry"] for stage in program.info["stages"]]
    written = [{o.name for o in program.entries[e].outputs if o.kind == "state"} for e in entries]
    assert entries == ["decode", "decode1", "decode2"]
    assert all(after < before for before, after in pairwise(written))
    assert [len(program.entries[e].calls(attention.target)) for e in entries] == [4, 3, 2]
    assert written[-1] == {"k0", "v0", "k3", "v3"}  # the warm-up layer and the top one


def test_stages_compute_what_the_kept_layers_do():
    """From position 0 on at the last depth, decoding is the model of the lowest and the top layer."""
    tokens = ids()
    program = rewritten("llama-gqa", DepthSchedule(min_layers=2, max_layers=2))

    torch.testing.assert_close(decoded(program, tokens), with_layers("llama-gqa", [0, 3], tokens), rtol=1e-4, atol=1e-4)
    assert "stages" not in program.info


def test_a_schedule_of_all_layers_is_the_same_program():
    tokens = ids()

    assert torch.equal(decoded(rewritten("gpt2", DepthSchedule(min_layers=4)), tokens), decoded(traced("gpt2"), tokens))


def test_one_artefact_changes_depth_on_the_way():
    tokens = ids(4)
    steps = (DepthSchedule(min_layers=2, length=18),)
    with sv.compile(traced("llama-gqa"), passes=steps, target="reference") as reference:
        expected = reference.generate(tokens, 24)
    with sv.compile(traced("llama-gqa"), passes=steps, target=CPU) as compiled:
        assert torch.equal(compiled.generate(tokens, 24), expected)
        assert [stage.position for stage in compiled.manifest.generation.stages] == [0, 6, 12]
