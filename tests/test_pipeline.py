"""How passes compose: order, blame, checks, ledger, observers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.check import relative_error, require_same
from sylvester.compiler.errors import CompileError, ContractBroken, InvalidProgram
from sylvester.compiler.pipeline import Contract, Event, Pass, Pipeline
from sylvester.compiler.program import Program
from tests.programs import ops, program

aten = torch.ops.aten


def linear(x: Tensor, weight: Tensor, spare: Tensor) -> Tensor:
    return torch.relu(x @ weight) + (spare * 0).sum()


def tiny() -> Program:
    return program(linear, torch.randn(3, 4), weights={"weight": torch.randn(4, 5), "spare": torch.randn(7)})


@dataclass(frozen=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing"
    contract: ClassVar[Contract] = "exact"
    depth: int = 3
    blocks: tuple[str, ...] = field(default_factory=tuple)

    def run(self, program: Program) -> Changes:
        changes = Changes()
        changes.refuse("idle", Refusal("there is nothing to do", program.main.calls()[0]))
        changes.refuse("idle", Refusal("there is nothing to do", program.main.calls()[-1]))
        return changes


@dataclass(frozen=True)
class DropZero(Pass):
    """x + 0 sum(w) -> x."""

    name: ClassVar[str] = "drop-zero"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        changes = Changes()
        node = program.main.calls(aten.add.Tensor)[0]
        program.main.replace(node, node.args[0])
        changes.apply("zero", node)
        return changes


@dataclass(frozen=True)
class DropRelu(Pass):
    name: ClassVar[str] = "drop-relu"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        node = program.main.calls(aten.relu.default)[0]
        program.main.replace(node, node.args[0])
        return Changes()


@dataclass(frozen=True)
class LossyDropRelu(DropRelu):
    name: ClassVar[str] = "lossy-drop-relu"
    contract: ClassVar[Contract] = "lossy"


@dataclass(frozen=True)
class Forgetful(Pass):
    name: ClassVar[str] = "forgetful"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        del program.main.calls()[0].meta["val"]
        return Changes()


@dataclass(frozen=True)
class Picky(Nothing):
    name: ClassVar[str] = "picky"

    def requires(self, program: Program) -> None:
        raise CompileError("no cache in this program")


def test_text_of_a_pass_shows_options_that_differ_from_the_defaults() -> None:
    assert str(Nothing()) == "nothing"
    assert str(Nothing(depth=5)) == "nothing(depth=5)"
    assert str(Nothing(blocks=("a",))) == "nothing(blocks=('a',))"


def test_the_given_program_is_untouched() -> None:
    before = tiny()
    text = str(before)

    after = Pipeline((DropZero(),))(before)

    assert str(before) == text
    assert ops(after) == ["aten.matmul", "aten.relu"]
    assert list(after.weights) == ["weight"]


def test_notes_of_a_clone_are_its_own() -> None:
    first = tiny()
    first.info["notes"] = []

    first.clone().info["notes"].append("found on the way")

    assert first.info["notes"] == []


def test_errors_name_the_pass() -> None:
    for bad, kind in ((Picky(), CompileError), (Forgetful(), InvalidProgram), (DropRelu(), ContractBroken)):
        with pytest.raises(kind) as caught:
            Pipeline((Nothing(), bad))(tiny())
        assert f"in pass 2/2: {bad}" in caught.value.__notes__


def test_a_broken_contract_says_where_and_how_much() -> None:
    with pytest.raises(ContractBroken, match=r"output 'y0' of entry 'forward' changed: .* at most 1e-04"):
        Pipeline((DropRelu(),))(tiny())


def test_the_check_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "aten.relu" not in ops(Pipeline((DropRelu(),), check=False)(tiny()))

    monkeypatch.setenv("SYLVESTER_CHECK", "0")
    assert "aten.relu" not in ops(Pipeline((DropRelu(),))(tiny()))


def test_a_lossy_pass_moves_the_reference() -> None:
    _, ledger = Pipeline((DropZero(), LossyDropRelu(), Nothing())).run(tiny())

    first, lossy, last = ledger.rows
    assert (first.error, last.error) == (0.0, 0.0)
    assert lossy.error is not None
    assert lossy.error > 0


def test_what_a_lossy_pass_changed_is_measured_on_the_examples() -> None:
    before = tiny()
    x, weight = before.main.examples["x0"], before.weights["weight"]
    dropped, exact = (x @ weight).double(), torch.relu(x @ weight).double()

    row = Pipeline((LossyDropRelu(),)).run(before)[1].rows[0]

    (measured,) = row.measured
    assert measured.error == pytest.approx(float((dropped - exact).norm() / exact.norm()), rel=1e-5)
    assert measured.largest == row.error == pytest.approx(float((dropped - exact).abs().max() / exact.max()), rel=1e-5)
    assert measured.next_token is None
    assert str(measured) == (f"on the example inputs forward.y0 moved by {measured.error:.1e} (relative, Euclidean)")


def test_lossy_passes_are_not_measured_without_checks() -> None:
    row = Pipeline((LossyDropRelu(),), check=False).run(tiny())[1].rows[0]

    assert (row.error, row.measured, row.runs) == (None, (), None)


def test_ledger_rows() -> None:
    _, ledger = Pipeline((DropZero(), Nothing(depth=2))).run(tiny())
    first, second = ledger.rows

    assert (first.text, first.contract, first.changes.counts()) == ("drop-zero", "exact", {"zero": 1})
    assert (first.before.nodes, first.after.nodes) == (5, 2)
    assert first.before.parameter_bytes - first.after.parameter_bytes == 7 * 4
    assert first.after.flops == 2 * 3 * 4 * 5 + 3 * 5
    assert second.before == first.after
    assert list(second.refusals().values()) == [(2, "matmul")]


def test_ledger_as_text_and_json() -> None:
    _, ledger = Pipeline((DropZero(), Nothing())).run(tiny())
    lines = str(ledger).splitlines()

    assert lines[0].split()[:3] == ["pass", "contract", "applied"]
    assert lines[1].startswith("drop-zero  exact     1 ")
    assert "drop-zero: zero x1" in lines
    assert "nothing: refused idle x2: there is nothing to do (at matmul)" in lines
    first, second = json.loads(ledger.to_json())
    assert first["applied"] == {"zero": 1}
    assert second["refused"] == [{"rule": "idle", "reason": "there is nothing to do", "count": 2, "at": "matmul"}]


def test_observers_see_every_pass() -> None:
    events: list[Event] = []

    Pipeline((DropZero(), Nothing()), observers=(events.append,))(tiny())

    assert [(e.index, e.step.name) for e in events] == [(0, "drop-zero"), (1, "nothing")]
    assert ops(events[-1].program) == ["aten.matmul", "aten.relu"]


def test_relative_error() -> None:
    x = torch.tensor([4.0, -2.0, float("nan"), float("inf")])

    assert relative_error(x, x.clone()) == 0.0
    assert relative_error(x, torch.tensor([4.0, -1.0, float("nan"), float("inf")])) == 0.25
    assert relative_error(x, torch.tensor([4.0, -2.0, 0.0, float("inf")])) == float("inf")
    assert relative_error(x, torch.tensor([4.0, -2.0, float("nan"), float("-inf")])) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(2, 1)) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")


def test_a_new_prefill_is_compared_with_forward() -> None:
    before = {"forward": {"logits": torch.ones(2)}}

    assert require_same(before, {"prefill": {"logits": torch.ones(2)}}) == 0.0
    assert require_same(before, {"decode": {"logits": torch.zeros(2)}}) is None
    with pytest.raises(ContractBroken, match="'logits' of entry 'prefill'"):
        require_same(before, {"prefill": {"logits": torch.zeros(2)}})
