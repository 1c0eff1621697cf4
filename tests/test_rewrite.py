"""The rule engine on tiny graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.changes import Refusal
from sylvester.compiler.errors import CompileError, InvalidProgram
from sylvester.compiler.match import Match
from sylvester.compiler.program import Program, value
from sylvester.compiler.rewrite import Rule, either, optional, rewrite
from sylvester.compiler.verify import verify
from tests.programs import ops, program

aten = torch.ops.aten
X = torch.randn(3, 4)


class ReluOfNeg(Rule):
    example = ((2, 3),)

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return torch.relu(-x)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return -x.clamp(max=0)


class Gate(Rule):
    """A sum that may be scaled, times a sigmoid: exercises optional parts, literals and commuted operands."""

    example = ((2, 3), (2, 3), 0.7)

    @staticmethod
    def before(x: Tensor, y: Tensor, scale: float) -> Tensor:
        return optional(torch.sigmoid(x) * scale, torch.sigmoid(x)) * torch.tanh(y)

    @staticmethod
    def after(x: Tensor, y: Tensor, scale: float | None) -> Tensor:
        return torch.tanh(y) / (1 + torch.exp(-x)) * (1.0 if scale is None else scale)


class Square(Rule):
    example = ((2, 3),)

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return torch.exp(x) * torch.exp(x)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return torch.exp(x + x)


def applied(built: Program, *rules: Rule, fuel: int | None = None) -> list[str]:
    changes = rewrite(built, rules, fuel=fuel)
    built.sweep()
    verify(built)
    return [item.rule for item in changes.applied]


def reasons(built: Program, *rules: Rule) -> list[str]:
    return [item.reason for item in rewrite(built, rules).refused]


def agrees(built: Program, function: object, *weights: Tensor) -> None:
    result = built.run("forward", built.main.examples)["y0"]
    torch.testing.assert_close(result, function(*built.main.examples.values(), *weights))


def test_before_becomes_after() -> None:
    built = program(lambda x: torch.relu(-x) + 1, X)

    assert applied(built, ReluOfNeg()) == ["ReluOfNeg"]
    assert ops(built) == ["aten.clamp", "aten.neg", "aten.add.Tensor"]
    agrees(built, lambda x: torch.relu(-x) + 1)


def test_fuel_bounds_the_rewrites() -> None:
    def twice(x: Tensor) -> Tensor:
        return torch.relu(-torch.relu(-x))

    assert applied(program(twice, X), ReluOfNeg(), fuel=0) == []
    assert applied(program(twice, X), ReluOfNeg(), fuel=1) == ["ReluOfNeg"]
    assert applied(program(twice, X), ReluOfNeg()) == ["ReluOfNeg", "ReluOfNeg"]


def test_a_rule_that_feeds_itself_is_named() -> None:
    class Swap(Rule):
        example = ((2, 3), (2, 3))

        @staticmethod
        def before(x: Tensor, y: Tensor) -> Tensor:
            return x - y

        @staticmethod
        def after(x: Tensor, y: Tensor) -> Tensor:
            return -(y - x)

    built = program(lambda x: x - torch.relu(x), X)

    with pytest.raises(CompileError, match="Swap does not converge") as caught:
        rewrite(built, [Swap()])
    assert any("at node" in note for note in caught.value.__notes__)


def test_operands_commute_and_optional_parts_may_be_absent() -> None:
    for function in (
        lambda x, y: torch.sigmoid(x) * torch.tanh(y),
        lambda x, y: torch.tanh(y) * torch.sigmoid(x),
        lambda x, y: torch.tanh(y) * (torch.sigmoid(x) * 3.0),
    ):
        built = program(function, X, torch.randn(3, 4))

        assert applied(built, Gate()) == ["Gate"]
        agrees(built, function)


def test_either_matches_each_spelling() -> None:
    class Reciprocal(Rule):
        example = ((2, 3),)

        @staticmethod
        def before(x: Tensor) -> Tensor:
            return either(1 / torch.sqrt(x), torch.sqrt(x) ** -1)

        @staticmethod
        def after(x: Tensor) -> Tensor:
            return torch.rsqrt(x)

    for function in (lambda x: 1 / torch.sqrt(x), lambda x: torch.sqrt(x) ** -1):
        built = program(function, X.abs() + 1)
        assert applied(built, Reciprocal()) == ["Reciprocal"]
        assert ops(built) == ["aten.rsqrt"]


def test_a_repeated_parameter_must_be_one_value() -> None:
    assert applied(program(lambda x: torch.exp(x) * torch.exp(x), X), Square()) == ["Square"]
    assert applied(program(lambda x, y: torch.exp(x) * torch.exp(y), X, X + 1), Square()) == []


def test_a_shared_subterm_must_be_one_node() -> None:
    class Softplus(Rule):
        example = ((2, 3),)

        @staticmethod
        def before(x: Tensor) -> Tensor:
            y = torch.exp(x)
            return torch.log(y + 1) * y

        @staticmethod
        def after(x: Tensor) -> Tensor:
            return torch.log1p(torch.exp(x)) * torch.exp(x)

    def shared(x: Tensor) -> Tensor:
        y = torch.exp(x)
        return y * torch.log(y + 1)

    assert applied(program(shared, X), Softplus()) == ["Softplus"]
    assert applied(program(lambda x: torch.exp(x) * torch.log(torch.exp(x + 1) + 1), X), Softplus()) == []


def test_a_value_used_outside_is_refused_by_the_engine() -> None:
    def function(x: Tensor) -> Tensor:
        negative = -x
        return torch.relu(negative) + negative * 2

    built = program(function, X)

    assert reasons(built, ReluOfNeg()) == ["an inner value is also used outside the pattern"]
    assert "aten.relu" in ops(built)


def test_an_outside_use_that_disappears_frees_the_rule() -> None:
    class Vanishing(Rule):
        example = ((2, 3), (2, 3))

        @staticmethod
        def before(x: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(x) + (torch.tanh(y) - torch.tanh(y))

        @staticmethod
        def after(x: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(x)

    def function(x: Tensor) -> Tensor:
        negative = -x
        gone = torch.tanh(negative)
        return torch.tanh(torch.relu(negative)) + (gone - gone)

    built = program(function, X)

    assert sorted(applied(built, ReluOfNeg(), Vanishing())) == ["ReluOfNeg", "Vanishing"]
    agrees(built, function)


def test_permission_is_a_reason_at_a_node() -> None:
    class Careful(Rule):
        example = ((2, 3),)
        before = ReluOfNeg.before
        after = ReluOfNeg.after

        def allow(self, match: Match) -> Refusal | None:
            columns = match.fact("x").shape[-1]
            return Refusal(f"{columns} columns are too few", match.root) if columns < 100 else None

    changes = rewrite(program(lambda x: torch.relu(-x), torch.randn(4, 1)), [Careful()])

    assert changes.applied == []
    assert [(r.rule, r.where, r.reason) for r in changes.refused] == [("Careful", "relu", "1 columns are too few")]


def test_only_near_misses_are_reported() -> None:
    class Softmax(Rule):
        example = ((2, 3),)

        @staticmethod
        def before(x: Tensor) -> Tensor:
            return torch.exp(torch.log(torch.sigmoid(torch.relu(x))))

        @staticmethod
        def after(x: Tensor) -> Tensor:
            return torch.sigmoid(torch.relu(x))

    near = program(lambda x: torch.exp(torch.log(torch.sigmoid(torch.tanh(x)))), X)
    far = program(lambda x: torch.exp(torch.tanh(x)), X)

    assert reasons(near, Softmax()) == ["expected relu, found tanh"]
    assert reasons(far, Softmax()) == []


def test_a_rewrite_of_another_type_is_an_error_that_names_the_rule() -> None:
    class Narrow(Rule):
        example = ((2, 3),)

        @staticmethod
        def before(x: Tensor) -> Tensor:
            return torch.relu(x)

        @staticmethod
        def after(x: Tensor) -> Tensor:
            return torch.relu(x).sum(-1)

    with pytest.raises(InvalidProgram, match="Narrow gives f32"):
        rewrite(program(lambda x: torch.relu(x) * 2, X), [Narrow()])


def test_new_nodes_have_facts_and_origin() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(-x)

    built = program(Model(), X)
    applied(built, ReluOfNeg())
    new = built.main.calls(aten.neg.default)[0]

    assert new.meta["made_by"] == ("ReluOfNeg",)
    assert "inner" in str(new.meta["nn_module_stack"])
    assert str(value(new).shape[0]).startswith("s")


def test_a_rule_that_returns_its_input_keeps_the_facts_of_that_input() -> None:
    class Twice(Rule):
        example = ((2, 3),)

        @staticmethod
        def before(x: Tensor) -> Tensor:
            return torch.neg(torch.neg(x))

        @staticmethod
        def after(x: Tensor) -> Tensor:
            return x

    built = program(lambda x: torch.neg(torch.neg(torch.relu(x))), X)
    relu = built.main.calls(aten.relu.default)[0]
    before = dict(relu.meta)

    assert applied(built, Twice()) == ["Twice"]
    assert relu.meta == before
    assert ops(built) == ["aten.relu"]


def test_transparent_casts_are_looked_through() -> None:
    class Half(Rule):
        example = ((2, 3),)
        transparent = (aten.to.dtype,)
        before = ReluOfNeg.before
        after = ReluOfNeg.after

    kept = program(lambda x: torch.relu(-(x.double())).to(torch.float32), X)
    assert reasons(kept, Half()) == ["the result is used as torch.float64, the rewrite gives torch.float32"]

    same = program(lambda x: torch.relu((-x.double()).float()), X)
    assert applied(same, Half()) == ["Half"]
    agrees(same, lambda x: torch.relu(-x))


def test_a_parameter_that_cannot_be_found_is_an_error() -> None:
    class Lost(Rule):
        example = ((2, 3), 5)

        @staticmethod
        def before(x: Tensor, count: int) -> Tensor:
            return F.relu(x)[..., : count * 2]

        @staticmethod
        def after(x: Tensor, count: int) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"\['count'\] cannot be found"):
        rewrite(program(lambda x: x * 2, X), [Lost()])
