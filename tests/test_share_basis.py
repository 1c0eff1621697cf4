"""Basis Sharing: a basis bound once by the layers of a group, coefficients of their own, fitted to the inputs."""

from __future__ import annotations

import pytest
import torch

from sylvester.compiler.cost import program_cost
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program, binding
from sylvester.passes.quantize import Quantize
from sylvester.passes.share_basis import ShareBasis, fitted, shared_basis
from tests import zoo
from tests.sharing import BLOCKS, HIDDEN, WIDTH, inputs, tower

LINEAR = torch.ops.aten.linear.default
KINDS = ("q", "k", "v", "up")


def applied(program, *passes):
    program, ledger = Pipeline(passes).run(program)
    return program, ledger.rows[-1]


def output(program: Program, x):
    return program.run("forward", {next(iter(program.main.examples)): x})[program.main.outputs[0].name]


def error(program: Program, other: Program, seed=5):
    return sum(float((output(program, x) - output(other, x)).square().sum()) for x in inputs(3, seed=seed))


def test_a_full_basis_is_exact():
    _, row = applied(tower(samples=3), ShareBasis(rank=1000))
    assert row.error < 1e-4
    assert row.changes.counts() == {f"factor {kind}": BLOCKS for kind in ("q", "k", "v", "o", "up", "down")}


def test_whitening_lowers_the_error_on_calibration_data():
    torch.manual_seed(0)
    weights = [torch.randn(7, 6, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(90, 6, dtype=torch.float64) * torch.logspace(1, -1, 6)
    gram, errors = x.T @ x, []
    for given in (gram, None):
        basis, parts = shared_basis(weights, given, 3)
        assert basis.shape == (3, 6)
        errors.append(sum(float(((w - c @ basis) @ x.T).square().sum()) for w, c in zip(weights, parts, strict=True)))
    singular = torch.linalg.svdvals(torch.cat(weights) @ x.T)
    assert errors[0] == pytest.approx(float(singular[3:].square().sum()), rel=1e-9)
    assert errors[0] < errors[1]


def test_whitened_outputs_are_nearer():
    program = tower(samples=4)
    bare = tower()
    assert error(program, applied(program, ShareBasis())[0]) < error(program, applied(bare, ShareBasis())[0])


def test_inputs_of_deficient_rank():
    weights = [torch.randn(5, 6, dtype=torch.float64)]
    x = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    basis, (c,) = shared_basis(weights, x.T @ x, 2)
    assert basis.isfinite().all()
    assert float(((weights[0] - c @ basis) @ x.T).abs().max()) < 1e-2


def test_a_basis_is_bound_once_and_read_by_its_group():
    program, _ = applied(tower(), ShareBasis(group=2, kinds=KINDS))
    bases = [n for n in program.main.placeholders("weight") if binding(n).key.endswith("basis")]
    assert len(bases) == len(KINDS) * BLOCKS // 2
    assert all(len(n.users) == 2 and all(u.target is LINEAR for u in n.users) for n in bases)


def test_bytes_and_operations_are_the_formula():
    before = tower()
    after, _ = applied(before, ShareBasis(ratio=0.25, group=2, kinds=("q", "up")))
    rq = int(0.75 * 2 * WIDTH * WIDTH / (WIDTH + 2 * WIDTH))
    ru = int(0.75 * 2 * WIDTH * HIDDEN / (WIDTH + 2 * HIDDEN))
    groups = BLOCKS // 2
    stored = groups * (rq * (WIDTH + 2 * WIDTH) + ru * (WIDTH + 2 * HIDDEN))
    dense = BLOCKS * WIDTH * (WIDTH + HIDDEN)
    assert before.weights.nbytes - after.weights.nbytes == 4 * (dense - stored)
    rows = next(iter(before.main.examples.values())).shape[:2].numel()
    moved = BLOCKS * (rq * 2 * WIDTH + ru * (WIDTH + HIDDEN))
    assert program_cost(before).flops - program_cost(after).flops == 2 * rows * (dense - moved)


def test_private_kinds_have_a_basis_each():
    program, _ = applied(tower(), ShareBasis(kinds=("o",)))
    assert sum(key.endswith("basis") for key in program.weights) == BLOCKS
    program, _ = applied(tower(), ShareBasis(kinds=("o",), private=()))
    assert sum(key.endswith("basis") for key in program.weights) == BLOCKS // 2


def test_biases_stay():
    program, _ = applied(tower(), ShareBasis(kinds=("q",)))
    assert all(f"blocks.{n}.a.bias" in program.weights for n in range(BLOCKS))


def test_coefficients_fitted_again_are_no_worse():
    torch.manual_seed(0)
    weight, basis = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    x = torch.randn(50, 6, dtype=torch.float64)
    best = fitted(weight, basis, x.T @ x)
    expected = torch.linalg.lstsq(x @ basis.T, x @ weight.T).solution.T
    torch.testing.assert_close(best, expected)
    program = tower(samples=4)
    plain, updated = (applied(program, ShareBasis(update=u))[0] for u in (False, True))
    assert error(program, updated, seed=1) < error(program, plain, seed=1)
    assert updated.weights.nbytes == plain.weights.nbytes


def test_both_factors_can_be_quantised():
    program, _ = applied(tower(samples=2), ShareBasis(kinds=("q",)), Quantize(weights=16, activations=None))
    assert sum(key.endswith("basis.bf16") for key in program.weights) == BLOCKS // 2


def test_without_data_the_ledger_says_so():
    _, row = applied(tower(), ShareBasis(update=True))
    assert "no calibration data: weights are factored without regard to their inputs" in row.changes.notes
    assert "update needs calibration data: coefficients stay as they are" in row.changes.notes


def test_models_without_such_layers():
    case = zoo.case("resnet")
    _, row = applied(zoo.traced(case.name).clone(), ShareBasis())
    assert row.changes.refused[0].reason == "no layer of repeated blocks can share a basis"
    case = zoo.case("mlp")
    with pytest.raises(CompileError, match="share-basis found no repeated blocks"):
        applied(zoo.traced(case.name).clone(), ShareBasis())


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"ratio": 0.0}, ValueError, "ratio is 0.0"),
        ({"ratio": 1}, ValueError, "ratio is 1"),
        ({"ratio": "x"}, TypeError, "ratio is 'x'"),
        ({"group": 0}, ValueError, "group is 0"),
        ({"group": 2.5}, TypeError, "group is 2.5"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"kinds": ()}, ValueError, "kinds is"),
        ({"private": ("x",)}, ValueError, "private is"),
        ({"update": 1}, TypeError, "update is 1"),
    ],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind, match=text):
        ShareBasis(**options)
