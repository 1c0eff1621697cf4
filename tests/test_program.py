"""The IR: printing and diffing, invariants, clones, and weights with one copy under several names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sylvester.compiler.errors import CompileError, InvalidProgram
from sylvester.compiler.printing import diff, render
from sylvester.compiler.program import Program, StateSlot, binding
from sylvester.compiler.trace import capture
from sylvester.compiler.verify import verify
from sylvester.compiler.weights import ParameterStore, merge_tied
from tests.graphs import LINEAR, decoder

aten = torch.ops.aten


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))))


@pytest.fixture
def program():
    return capture(Tied().eval(), (torch.randn(3, 4),), dynamic=({0: torch.export.Dim.STATIC},))


def test_printing_shows_facts_keys_and_origin(program):
    assert render(program).splitlines() == [
        "program: 1 weights (0.00 MB), 0 state slots",
        "",
        "entry forward(x: f32[3, 4]) -> (out0: f32[3, 4]) {",
        "  %linear: f32[3, 4] = linear(%x, first.weight)  # first",
        "  %relu: f32[3, 4] = relu(%linear)",
        "  %linear_1: f32[3, 4] = linear(%relu, first.weight)  # second",
        "  %relu_1: f32[3, 4] = relu(%linear_1)",
        "  return %relu_1",
        "}",
    ]


def test_diff_shows_what_changed_and_nothing_else(program):
    changed = program.clone()
    last = changed.main.calls(aten.relu.default)[-1]
    changed.main.replace(last, last.args[0])
    changed.sweep()

    lines = [
        line for line in diff(program, changed).splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert lines == ["-  %relu_1: f32[3, 4] = relu(%linear_1)", "-  return %relu_1", "+  return %linear_1"]
    assert diff(program, program.clone()) == ""


def test_a_clone_is_edited_alone_and_shares_its_tensors(program):
    copy = program.clone()
    copy.weights["first.weight"] = torch.zeros(4, 4)

    assert program.weights["first.weight"].any()
    assert program.clone().weights["first.weight"].data_ptr() == program.weights["first.weight"].data_ptr()


def test_tied_weights_are_one_key_counted_once(tmp_path):
    weight = torch.randn(5, 3)
    store = merge_tied({"a": weight, "b": weight, "c": weight.clone()})
    store.save(tmp_path / "weights.safetensors")
    again = ParameterStore.load(tmp_path / "weights.safetensors")

    for found in (store, again):
        assert found.nbytes == 2 * weight.nbytes
        assert torch.equal(found["b"], weight)
        assert sorted(found) == ["a", "c"]


def test_an_unknown_weight_or_entry_is_named(program):
    with pytest.raises(CompileError, match="no weight named 'nope'"):
        program.weights["nope"]
    with pytest.raises(CompileError, match="no entry named 'nope'"):
        program.entry("nope")


def no_fact(program: Program) -> None:
    del program.main.calls()[0].meta["val"]


def wrong_weight(program: Program) -> None:
    program.weights["first.weight"] = torch.zeros(4, 5)


def bound_twice(program: Program) -> None:
    weight, given = program.main.placeholders("weight")[0], program.main.placeholders("input")[0]
    given.meta["bind"] = binding(weight)


def sparse_slots(program: Program) -> None:
    program.state["k"] = StateSlot(1, (1, 1, 4, 2), torch.float32)


def extra_name(program: Program) -> None:
    program.main.outputs *= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_fact, "node has no tensor fact"),
        (wrong_weight, r"is torch.float32\[4, 5\], the graph expects torch.float32\[4, 4\]"),
        (bound_twice, "is bound twice"),
        (sparse_slots, r"state slots are numbered \[1\], expected 0..0"),
        (extra_name, "1 results but 2 output names"),
    ],
)
def test_a_broken_invariant_is_found(program, damage, message):
    verify(program)
    damage(program)

    with pytest.raises(InvalidProgram, match=message):
        verify(program)


def test_a_mutating_op_is_refused(program):
    node = program.main.calls(aten.relu.default)[0]
    node.target = aten.relu_.default

    with pytest.raises(InvalidProgram, match="op mutates its input"):
        verify(program)


def test_rewrite_takes_what_compile_takes_and_leaves_the_program_alone():
    program = decoder(blocks=3)
    rewritten = program.rewrite(["drop-sublayers(ffn=(1,))", "fold-norms"])

    assert len(rewritten.main.calls(LINEAR)) == len(program.main.calls(LINEAR)) - 2
    assert "block1.up.weight" in program.weights
    assert "block1.up.weight" not in rewritten.weights
