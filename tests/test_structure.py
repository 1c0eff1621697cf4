"""Blocks and their parts in every model of the zoo, from dataflow and execution alone."""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylvester.compiler import ops
from sylvester.compiler.dataflow import Dataflow
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Output, Program, value
from sylvester.compiler.repeats import Run, runs
from sylvester.compiler.structure import Structure, discover
from sylvester.compiler.trace import capture
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.fold_constants import FoldConstants
from sylvester.passes.raise_attention import RaiseAttention
from sylvester.passes.raise_glu import RaiseGlu
from sylvester.passes.raise_norms import RaiseNorms
from sylvester.passes.raise_rope import RaiseRope
from tests import zoo
from tests.programs import program


@cache
def canonical(name: str) -> Program:
    case = zoo.case(name)
    made = capture(case.model, case.inputs, dynamic=case.dynamic)
    Canonicalize().run(made)
    made.sweep()
    return made


def found(model: nn.Module, *inputs: Tensor) -> Structure:
    made = program(model, *inputs)
    Canonicalize().run(made)
    made.sweep()
    return discover(made)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_zoo(name: str) -> None:
    structure = discover(canonical(name))

    stacks = [(len(stack.blocks), stack.blocks[0].kinds) for stack in structure.stacks]
    assert stacks == [(stack.blocks, stack.parts) for stack in zoo.case(name).stacks]
    for stack in structure.stacks:
        assert all(block.kinds == stack.blocks[0].kinds for block in stack.blocks)


@pytest.mark.parametrize("name", [n for n in zoo.NAMES if zoo.case(n).stacks])
def test_blocks_follow_each_other_and_correspond(name: str) -> None:
    made = canonical(name)

    for stack in discover(made).stacks:
        first = stack.blocks[0]
        for block, after in zip(stack.blocks, stack.blocks[1:], strict=False):
            assert block.end is after.start
            assert set(block.nodes).isdisjoint(after.nodes)
        for block in stack.blocks:
            shapes = [made.weights[key].shape for key in block.parameters]
            assert shapes == [made.weights[key].shape for key in first.parameters]
            assert [value(n).dtype for n in block.sides] == [value(n).dtype for n in first.sides]
            assert len(set(block.parameters)) == len(block.parameters)
        assert {first.start, stack.blocks[-1].end} <= set(stack.stream)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-neox", "bert", "opt", "odd-names", "t5"])
def test_removing_the_writers_leaves_the_stream_alone(name: str) -> None:
    """With every addend replaced by zeros, a pre-norm stream passes the blocks unchanged."""
    made = canonical(name).clone()
    stack = discover(made).stacks[-1]
    for part in [part for block in stack.blocks for part in block.parts]:
        zeros = made.main.emit(torch.ops.aten.zeros_like.default, part.writer, before=part.writer.next)
        made.main.replace(part.writer, zeros)
    made.main.graph.output_node().args = ((stack.blocks[0].start, stack.blocks[-1].end),)
    made.main.outputs[:] = [Output("output", "start"), Output("output", "end")]

    result = made.run("forward", made.main.examples)

    is_post_norm = len(stack.blocks[0].segments) > len({part.stream for part in stack.blocks[0].parts})
    assert torch.equal(result["start"], result["end"]) != is_post_norm


@pytest.mark.parametrize("name", ["llama-gqa", "gemma", "phi", "bert", "t5", "odd-names"])
def test_raised_graphs_have_the_same_structure(name: str) -> None:
    raised = Pipeline((FoldConstants(), RaiseNorms(), RaiseRope(), RaiseAttention(), RaiseGlu()))(canonical(name))

    assert raised.main.calls(torch.ops.sylvester.attention.default)
    assert [s.blocks[0].kinds for s in discover(raised).stacks] == [s.parts for s in zoo.case(name).stacks]
    assert len(discover(raised).blocks) == zoo.case(name).blocks


def test_parallel_parts_share_one_segment() -> None:
    block = discover(canonical("gpt-neox")).blocks[1]

    assert len(block.segments) == 1
    assert block.parts[0].stream is block.parts[1].stream
    assert block.kinds == ("attention", "ffn")


def test_readers_writers_and_norms_of_a_llama_block() -> None:
    attention, ffn = discover(canonical("llama-gqa")).blocks[2].parts

    assert _weights(attention.readers) == ["q_proj", "k_proj", "v_proj"]
    assert _weights(attention.writers) == ["o_proj"]
    assert _weights(ffn.readers) == ["gate_proj", "up_proj"]
    assert _weights(ffn.writers) == ["down_proj"]
    assert len(attention.norms) == len(ffn.norms) == 1
    assert ffn.writer in ffn.writers


def test_post_norm_readers_read_the_stream_itself() -> None:
    attention, ffn = discover(canonical("bert")).blocks[0].parts

    assert not attention.norms
    assert all(reader.args[0] is attention.stream for reader in attention.readers)
    assert all(reader.args[0] is ffn.stream for reader in ffn.readers)


def test_keys_of_another_stream_belong_to_the_block_that_uses_them() -> None:
    stack = discover(canonical("t5")).stacks[1]

    for layer, block in enumerate(stack.blocks):
        assert f"decoder.block.{layer}.layer.1.EncDecAttention.k.weight" in block.parameters


def _weights(nodes: tuple[torch.fx.Node, ...]) -> list[str]:
    return [str(n.args[1]).split("_weight")[0].split("self_attn_")[-1].split("mlp_")[-1] for n in nodes]


class Raised(nn.Module):
    """A block written in dialect ops."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(2, 16))
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(ops.rms_norm(x, self.gain[0], 1e-6)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        seen = ops.attention(heads[0], heads[1], heads[2], None, None, 0.5, True, 0)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        normed = ops.rms_norm(x, self.gain[1], 1e-6)
        return x + self.down(ops.swiglu(self.gate(normed), self.up(normed)))


def test_blocks_of_dialect_ops() -> None:
    structure = found(nn.Sequential(*(Raised() for _ in range(3))), torch.randn(2, 5, 16))

    assert [block.kinds for block in structure.blocks] == [("attention", "ffn")] * 3


class TokenMixer(nn.Module):
    """Mixes tokens with a matrix over their axis, then features with another."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features = nn.Linear(6, 6), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.mT).mT
        return x + self.features(x).relu()


def test_mixing_tokens_by_a_matrix_is_a_mixer_and_not_an_ffn() -> None:
    structure = found(nn.Sequential(*(TokenMixer() for _ in range(3))), torch.randn(2, 6, 16))

    assert [block.kinds for block in structure.blocks] == [("mixer", "ffn")] * 3


class Gated(nn.Module):
    """A router that weighs two experts: products of values, but each token on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.first, self.second = nn.Linear(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1).unsqueeze(-2)
        experts = torch.stack((self.first(x).relu(), self.second(x).relu()), -2)
        return x + (shares @ experts).squeeze(-2)


def test_router_is_an_ffn_although_it_has_softmax_and_a_product() -> None:
    structure = found(nn.Sequential(*(Gated() for _ in range(4))), torch.randn(2, 6, 16))

    assert [block.kinds for block in structure.blocks] == [("ffn",)] * 4


class ZeroInit(nn.Module):
    """Attention whose output matrix starts as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(F.layer_norm(x, (16,))).chunk(3, -1)
        return x + self.out((q @ k.mT).softmax(-1) @ v)


def test_zero_weights_do_not_hide_attention() -> None:
    structure = found(nn.Sequential(*(ZeroInit() for _ in range(2))), torch.randn(2, 6, 16))

    assert [block.kinds for block in structure.blocks] == [("attention",)] * 2


def test_different_widths_do_not_repeat() -> None:
    class Ffn(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    assert not found(nn.Sequential(Ffn(8), Ffn(9), Ffn(10)), torch.randn(2, 6, 16)).stacks
    assert len(found(nn.Sequential(Ffn(8), Ffn(9), Ffn(8), Ffn(9)), torch.randn(2, 6, 16)).blocks) == 2


def test_shared_weights_still_repeat() -> None:
    layer = Raised()

    structure = found(nn.Sequential(layer, layer, layer), torch.randn(2, 5, 16))

    assert len(structure.blocks) == 3
    assert len({block.parameters for block in structure.blocks}) == 1


def test_model_without_repeats_is_empty_and_says_so() -> None:
    structure = discover(canonical("mlp"))

    assert structure == Structure()
    assert str(structure) == "no repeated blocks"


def test_text_names_the_parts() -> None:
    text = str(discover(canonical("t5")))

    assert "3 blocks of (attention, ffn)" in text
    assert "4 blocks of (attention, cross_attention, ffn)" in text


def test_spine_holds_every_residual_sum() -> None:
    made = canonical("llama-gqa")
    flow = Dataflow(made.main)
    spine = flow.spine(flow.sources()[0])

    assert spine[0].target is torch.ops.aten.embedding.default
    assert spine[-1] is made.main.results()[0]
    assert [n.target for n in spine].count(torch.ops.aten.add.Tensor) == 8


@pytest.mark.parametrize(
    ("items", "anchors", "expected"),
    [
        ("abababab", "a", [Run(0, 2, 4)]),
        ("xabababy", "b", [Run(2, 2, 2)]),
        ("xbababay", "b", [Run(1, 2, 3)]),
        ("aaaabbbb", "ab", [Run(0, 1, 4), Run(4, 1, 4)]),
        ("aabaab", "ab", [Run(0, 3, 2)]),
        ("abcabc", "", []),
        ("abc", "abc", []),
        ("", "", []),
    ],
)
def test_runs(items: str, anchors: str, expected: list[Run]) -> None:
    assert runs(items, [item in anchors for item in items]) == expected


def test_discovery_is_fast() -> None:
    made = canonical("t5")
    start = time.perf_counter()
    discover(made)

    assert time.perf_counter() - start < 5
