"""Neighbouring blocks share their matrices, the least important ones go: exactly these, in every entry, stored once."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import sylvester as sv
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.causal_lm import chunked_error
from sylvester.compiler.check import evaluate, random_state
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import find_layers
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import binding
from sylvester.compiler.quality import perplexity
from sylvester.passes.block_gates import gated, gates
from sylvester.passes.block_groups import even_groups, require_neighbours
from sylvester.passes.greedy_depth import LOSS, least_missed
from sylvester.passes.share_blocks import ShareBlocks
from tests import graphs, zoo

MODELS = (*zoo.DIVERSE, "bert", "vit")


@functools.cache
def traced(name: str = "llama-gqa") -> sv.Program:
    case = zoo.case(name)
    program = zoo.traced(case.name).clone()
    program.calibration = Calibration((case.inputs,))
    return program


def run(program: sv.Program, step: ShareBlocks):
    program, ledger = Pipeline((step,)).run(program)
    return program, ledger.rows[0].changes


def calls(program: sv.Program) -> dict[str, list[str]]:
    return {name: [str(node.target) for node in entry.calls()] for name, entry in program.entries.items()}


def layer_keys(program: sv.Program, number: int) -> list[str]:
    return [binding(n).key for _, segment in find_layers(program)[number].main.parts for n in segment.parameters]


def copied(program: sv.Program, pairs: dict[int, int]) -> sv.Program:
    """The matrices, with the biases of these, of other blocks put in the place of those of the first ones."""
    other = program.clone()
    for to, source in pairs.items():
        for a, b in zip(layer_keys(program, to), layer_keys(program, source), strict=True):
            if program.weights[a].ndim > 1 or any("linear" in str(u.target) for u in program.users(a)):
                other.weights[a] = program.weights[b]
    return other


def same(a: sv.Program, b: sv.Program) -> bool:
    found, wanted = evaluate(a), evaluate(b)
    assert found.keys() == wanted.keys()
    assert wanted
    return all(torch.equal(found[entry][name], t) for entry in wanted for name, t in wanted[entry].items())


def test_tiny_graph_before_and_after():
    program = graphs.decoder(blocks=3)
    after, changes = run(program, ShareBlocks(((0, 1),)))
    assert changes.counts() == {"share": 1}
    assert calls(after) == calls(program)
    gone = set(program.weights) - set(after.weights)
    assert gone == {f"block1.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")} | {
        f"block1.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")
    }
    readers = {node.name: binding(node.args[1]).key for node in after.main.calls(graphs.LINEAR)}
    assert list(readers.values())[:12] == [f"block0.{part}.weight" for part in ("q", "k", "v", "o", "up", "down")] * 2
    assert [(b.layer, b.part) for b in changes.layers] == [(find_layers(program)[1].path, "block")]


@pytest.mark.parametrize("name", MODELS)
def test_sharing_is_copying_in_every_entry(name):
    program = traced(name)
    after, changes = run(program, ShareBlocks(((1, 2),)))
    assert changes.counts() == {"share": 1}
    assert calls(after) == calls(program)
    assert same(after, copied(program, {2: 1}))
    rest = {key for key in program.weights if key not in layer_keys(program, 2)}
    assert all(after.weights[key] is program.weights[key] for key in rest)
    if "decode" in program.entries:
        tokens = next(iter(zoo.case(name).inputs.values()))
        assert chunked_error(after, tokens, (4, 1, 3)) < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert"])
def test_bytes_fall_by_the_group_factor(name):
    program = traced(name)
    after, _ = run(program, ShareBlocks(2, keep_first=0, keep_last=0))
    assert calls(after) == calls(program)
    shared = [key for n in range(4) for key in layer_keys(program, n) if program.weights[key].ndim > 1]
    size = sum(program.weights[key].nbytes for key in dict.fromkeys(shared))
    left = sum(program.weights[key].nbytes for key in dict.fromkeys(shared) if key in after.weights)
    assert 2 * left == size


@pytest.mark.parametrize("name", ["llama-gqa", "phi", "gpt2", "opt", "odd-names", "bert", "vit"])
def test_removal_takes_exactly_the_nodes_of_the_blocks(name):
    program = traced(name)
    after, changes = run(program, ShareBlocks(remove=0.5))
    blocks = zoo.case(name).blocks
    assert changes.counts() == {"block": blocks // 2}
    assert len(find_layers(after)) == blocks - blocks // 2
    gone = [n for n, layer in enumerate(find_layers(program)) if layer.path in {b.layer for b in changes.layers}]
    keys = {key for n in gone for key in layer_keys(program, n)}
    kept = {key for n in range(blocks) if n not in gone for key in layer_keys(program, n)}
    missing = set(program.weights) - set(after.weights)
    assert {key for key in missing if "LayerNorm" not in key} == {key for key in keys - kept if "LayerNorm" not in key}
    before = [node.name for node in program.main.calls()]
    left = [node.name for node in after.main.calls()]
    assert [name for name in before if name in set(left)] == left
    assert all(after.weights[key] is program.weights[key] for key in after.weights)
    attention = sum("attention" in target for target in calls(program)[next(iter(program.entries))])
    assert sum("attention" in t for t in calls(after)[next(iter(after.entries))]) == attention - len(gone)
    assert len(after.state) == len(program.state) // blocks * (blocks - len(gone))


def test_removed_and_shared_at_once():
    program = traced("opt")
    after, changes = run(program, ShareBlocks(3, remove=0.2))
    assert changes.counts() == {"block": 1, "share": 1}
    assert len({key for key in after.weights if key.endswith("fc1.weight")}) == 3
    assert chunked_error(after, zoo.case("opt").inputs["input_ids"], (4, 1, 3)) < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-neox", "bert"])
def test_gates_of_one_change_nothing(name):
    program = traced(name)
    copy, keys = gated(program, find_layers(program))
    assert len(keys) == len(find_layers(program))
    entry, example = next(iter(program.entries)), program.main.examples
    state = random_state(program, program.main)
    found, wanted = (p.run(entry, example, state) for p in (copy, program))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    copy.weights[keys[1]] = torch.zeros(())
    assert not all(torch.equal(value, wanted[key]) for key, value in copy.run(entry, example, state).items())


def idle(program: sv.Program, number: int) -> sv.Program:
    """A clone in which a block adds next to nothing."""
    other = program.clone()
    for key in layer_keys(program, number):
        if "o_proj" in key or "down_proj" in key:
            other.weights[key] = program.weights[key] / 100
    return other


@pytest.mark.parametrize("rank", ["loss", "similarity", "gates"])
def test_an_idle_block_goes_first(rank):
    program = idle(traced(), 2)
    after, changes = run(program, ShareBlocks(remove=0.25, rank=rank, steps=12))
    assert [b.what for b in changes.layers] == ["dropped"]
    assert changes.layers[0].layer == find_layers(program)[2].path
    named = [LOSS] if rank == "loss" else [f"importance by {rank}"] * 4
    assert [f.name for f in changes.figures] == named
    assert len(after.state) == 6


def test_each_layer_that_goes_is_the_best_choice_for_what_is_left():
    """Beside programs in which the pass that skips layers has taken them out."""
    program = traced()
    layers = find_layers(program)

    def loss(gone: tuple[int, ...]) -> float:
        left, _ = Pipeline((sv.passes.SkipLayers(layers=gone, phase="all"),)).run(program)
        return perplexity(left, program.calibration.fit)

    order = list(least_missed(program, layers[:3], 2))
    first, second = (layer.index for layer, _ in order)
    singles = {n: loss((n,)) for n in range(3)}
    pairs = {n: loss((first, n)) for n in range(3) if n != first}
    assert first == min(singles, key=singles.__getitem__)
    assert second == min(pairs, key=pairs.__getitem__)
    assert [found for _, found in order] == pytest.approx([singles[first], pairs[second]], rel=1e-6)


def test_gates_are_seeded_and_bounded():
    program, tokens = traced().clone(), torch.randint(3, zoo.VOCAB, (12, 9))
    program.calibration = Calibration(tuple({"input_ids": row} for row in tokens.split(1)))
    layers = find_layers(program)
    first, again, other = (gates(program, layers, 4, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(0 <= gate < 1 for gate in first)


def test_gates_of_a_program_that_predicts_no_tokens():
    program = traced("bert")
    assert all(0 <= gate < 1 for gate in gates(program, find_layers(program), 3, 0))


def test_neighbours_that_are_most_alike_share():
    joins = {2: 0.9, 3: 0.8, 4: 0.95, 5: 0.7, 6: 0.99}
    assert even_groups(8, 7, joins) == ((5, 6),)
    assert even_groups(8, 6, joins) == ((3, 4), (5, 6))
    assert even_groups(8, 5, joins) == ((1, 2), (3, 4), (5, 6))
    assert even_groups(8, 4, joins) == ((1, 2, 3, 4), (5, 6))
    assert even_groups(8, 3, joins) == ((1, 2, 3, 4, 5, 6),)
    with pytest.raises(CompileError, match="groups is 2, but only equal neighbours can share: 3 sets are left"):
        even_groups(8, 2, joins)


def test_a_group_shares_the_first_of_its_blocks():
    after, changes = run(traced("opt"), ShareBlocks(((1, 2, 3),)))
    assert [b.what for b in changes.layers] == [f"shares {find_layers(traced('opt'))[1].path}"] * 2
    assert len({key for key in after.weights if key.endswith("fc1.weight")}) == 3


def test_sharing_twice_is_sharing_all():
    program = traced()
    once, _ = run(program, ShareBlocks(((1, 2, 3),)))
    twice, _ = run(run(program, ShareBlocks(((1, 2),)))[0], ShareBlocks(((2, 3),)))
    assert set(once.weights) == set(twice.weights)
    assert same(once, twice)


def test_saved_and_compiled_once(tmp_path):
    program = graphs.decoder(blocks=4, width=48)
    after, _ = run(program, ShareBlocks(((0, 1), (2, 3))))
    sizes, results = [], []
    for name, built in (("plain", program), ("shared", after)):
        with sv.compile(built, target="cpu") as compiled:
            compiled.save(tmp_path / name)
            results.append(compiled(built.main.examples["x0"]))
        sizes.append(sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")))
    lone = sum(program.weights[key].nbytes for key in layer_keys(program, 1) if program.weights[key].ndim > 1)
    assert sizes[0] - sizes[1] >= 2 * lone
    torch.testing.assert_close(results[1], after.run("forward", after.main.examples)["y0"], rtol=1e-4, atol=1e-4)
    after.save(tmp_path / "program")
    assert set(sv.Program.load(tmp_path / "program").weights) == set(after.weights)


def test_numbers_need_calibration_data_and_groups_do_not():
    program = traced().clone()
    program.calibration = None
    with pytest.raises(CompileError, match="blocks are ranked and grouped on calibration data, there is none"):
        run(program, ShareBlocks(3))
    with pytest.raises(CompileError, match="calibration data"):
        run(program, ShareBlocks(remove=0.25))
    assert run(program, ShareBlocks(((1, 2),)))[1].counts() == {"share": 1}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (ShareBlocks(((3, 4),)), "groups names layer 4, the program has layers 0 to 3"),
        (ShareBlocks(5), "groups is 5, expected 3 to 4"),
        (ShareBlocks(2), "groups is 2, expected 3 to 4"),
        (ShareBlocks(remove=0.8), "3 of 4 blocks would go, 2 may"),
    ],
)
def test_impossible_requests_are_errors(step, message):
    with pytest.raises(CompileError, match=message):
        run(traced(), step)


def test_a_program_without_repeated_blocks_is_an_error():
    with pytest.raises(CompileError, match="no repeated residual blocks"):
        run(traced("mlp"), ShareBlocks(((0, 1),)))


def test_blocks_of_two_stacks_are_no_neighbours():
    layers = find_layers(traced())
    require_neighbours(layers[1:3])
    with pytest.raises(CompileError, match="blocks 1 and 2 are no neighbours"):
        require_neighbours((layers[1], replace(layers[2], place=0)))


def test_unequal_blocks_are_refused_with_a_reason():
    program = traced("resnet")
    after, changes = run(program, ShareBlocks(((2, 3),)))
    assert not changes.applied
    assert [r.reason for r in changes.refused] == ["it does not compute what block 2 does, in equal shapes"]
    assert calls(after) == calls(program)


def test_a_block_that_shrinks_the_stream_stays():
    program = traced("resnet")
    after, changes = run(program, ShareBlocks(remove=0.4, rank="similarity"))
    assert changes.counts() == {"block": 2}
    assert len(changes.figures) == len(find_layers(program)) - 1
    assert evaluate(after)
    with pytest.raises(CompileError, match="3 blocks would go, of those that may 2 keep the shape"):
        run(program, ShareBlocks(remove=0.6))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "nothing to do"),
        ({"groups": ((1, 2), (2, 3))}, ValueError, "block 2 is in two groups"),
        ({"groups": ((1, 3),)}, ValueError, "expected neighbouring blocks in order"),
        ({"groups": ((1,),)}, ValueError, "at least 2 block numbers"),
        ({"groups": "1,2"}, TypeError, "groups is a str"),
        ({"groups": -1}, ValueError, "groups is -1"),
        ({"groups": ((1, 2),), "remove": 0.5}, ValueError, "explicit groups number the blocks as they are"),
        ({"remove": 1.0}, ValueError, "remove is 1.0"),
        ({"groups": 3, "rank": "size"}, ValueError, "rank is 'size'"),
        ({"groups": 3, "keep_first": -1}, ValueError, "keep_first is -1"),
        ({"groups": 3, "steps": 0}, ValueError, "steps is 0"),
    ],
)
def test_bad_options_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        ShareBlocks(**options)


def test_options_by_text():
    from sylvester.compiler.resolve import resolve_passes

    step = ShareBlocks(((4, 5), (6, 7)), keep_last=2)
    assert str(step) == "share-blocks(groups=((4, 5), (6, 7)), keep_last=2)"
    assert resolve_passes("share-blocks(groups=12, remove=0.1)") == (ShareBlocks(12, 0.1),)
