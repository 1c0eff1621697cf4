"""Layers and their places in every entry, slots that are dropped, stages of decoding."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sylvester.compiler.errors import CompileError, InvalidProgram
from sylvester.compiler.layers import chosen, find_layers
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.region import bypass
from sylvester.compiler.slots import drop_slots
from sylvester.compiler.stages import DECODE, Stage, entry_at, remember, spans
from sylvester.compiler.verify import verify
from sylvester.passes import DropSublayers
from sylvester.passes.depth_schedule import _forget
from tests import zoo
from tests.depth_cases import rewritten, traced
from tests.graphs import ADD, EMBEDDING, GELU, Builder, block, decoder
from tests.nightly import by_night

STACKED = tuple(name for name, entry in zoo.ENTRIES.items() if entry.stacks)


@pytest.mark.parametrize("name", by_night(STACKED, ("llama-gqa", "phi", "gpt2", "bert", "t5", "vit", "odd-names")))
def test_every_block_is_a_layer_with_its_parts(name):
    case = zoo.case(name)
    layers = find_layers(traced(name))

    assert len(layers) == case.blocks
    expected = [stack.parts for stack in case.stacks for _ in range(stack.blocks)]
    assert [tuple(part.kind for part, _ in layer.main.parts) for layer in layers] == expected


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_decode_has_the_same_layers_one_after_another(name):
    layers = find_layers(traced(name))

    for layer in layers:
        site = layer.sites[DECODE]
        assert [part.kind for part, _ in site.parts] == [part.kind for part, _ in layer.main.parts]
        assert site.slots == (f"k{layer.index}", f"v{layer.index}")
    for before, after in pairwise(layers):
        assert before.sites[DECODE].end is after.sites[DECODE].start


def test_layers_that_lost_a_part_are_still_layers():
    layers = find_layers(rewritten("llama-gqa", DropSublayers(attention=(1,), ffn=(2,))))

    assert [[part.kind for part, _ in layer.main.parts] for layer in layers] == [
        ["attention", "ffn"],
        ["ffn"],
        ["attention"],
        ["attention", "ffn"],
    ]


@pytest.mark.parametrize(
    ("attention", "ffn"), [((3,), (5,)), ((1,), (4,)), ((5,), (2,)), ((2, 5), (3,)), ((1, 3, 5, 7), ())]
)
def test_irregular_drops_leave_layers_in_order(attention, ffn):
    """Also where what is left repeats in some other way."""
    model = decoder(blocks=8)
    layers = find_layers(Pipeline((DropSublayers(attention=attention, ffn=ffn),))(model))

    expected = [[kind for kind, gone in (("attention", attention), ("ffn", ffn)) if n not in gone] for n in range(8)]
    assert [[part.kind for part, _ in layer.main.parts] for layer in layers] == expected
    assert [layer.original for layer in layers] == list(range(8))


def test_a_block_with_a_kind_twice_is_one_layer():
    b = Builder()
    x = b.call(EMBEDDING, b.weight("table", 31, 24), b.ids(2, 5, high=31))
    for n in range(3):
        x = b.call(ADD, x, b.linear(b.call(GELU, b.linear(b.rms(x, f"n{n}"), f"up{n}", 40)), f"down{n}", 24))
        x = block(b, x, f"block{n}", b.rms)
    layers = find_layers(b.returns(x))

    assert [[part.kind for part, _ in layer.main.parts] for layer in layers] == [["ffn", "attention", "ffn"]] * 3


def test_a_model_without_repeats_is_an_error():
    with pytest.raises(CompileError, match="no repeated residual blocks"):
        find_layers(traced("mlp"))


def test_an_unknown_layer_is_an_error_that_names_the_range():
    with pytest.raises(CompileError, match=r"ffn names layer 7, the program has layers 0 to 3"):
        chosen(find_layers(traced("llama-gqa")), (1, 7), "ffn")


def test_dropped_slots_leave_the_others_numbered_from_zero():
    program = traced("llama-gqa").clone()
    layer = find_layers(program)[1]
    bypass(program.entries[DECODE], layer.sites[DECODE].start, layer.sites[DECODE].end)
    names = drop_slots(program, ("k1", "v1"))
    program.sweep()

    verify(program)
    assert names["k2"] == "k1"
    assert names["v3"] == "v2"
    assert {key: slot.index for key, slot in program.state.items()} == {
        "k0": 0, "v0": 1, "k1": 2, "v1": 3, "k2": 4, "v2": 5,
    }  # fmt: skip


def test_stages_go_by_position_and_by_generated_tokens():
    stages = (Stage("a"), Stage("b", generated=2), Stage("c", position=10, generated=2))

    assert [entry_at(stages, *at) for at in ((0, 0), (30, 1), (5, 2), (10, 2), (11, 9))] == ["a", "a", "b", "c", "c"]
    assert list(spans(stages, 14, prompt=7)) == [("a", 7, 9), ("b", 9, 10), ("c", 10, 14)]
    assert list(spans((Stage(DECODE),), 5)) == [(DECODE, 0, 5)]


def test_a_stage_may_not_read_what_the_one_before_left_alone():
    program = traced("llama-gqa").clone()
    shallow = program.entries[DECODE].clone()
    layer = find_layers(program)[1]
    names = {node.name: node for node in shallow.graph.nodes}
    from sylvester.compiler.region import bypass

    bypass(shallow, names[layer.sites[DECODE].start.name], names[layer.sites[DECODE].end.name])
    _forget(shallow, {"k1", "v1"})
    program.entries |= {"shallow": shallow, "deep": program.entries[DECODE].clone()}
    remember(program.info, [Stage(DECODE), Stage("shallow", position=4)])
    program.sweep()
    del program.entries["deep"]
    verify(program)

    program.entries["deep"] = program.entries[DECODE].clone()
    remember(program.info, [Stage(DECODE), Stage("shallow", position=4), Stage("deep", position=8)])
    with pytest.raises(InvalidProgram, match=r"stage 'deep' reads state \['k1', 'v1'\] from position 8 on"):
        verify(program)
