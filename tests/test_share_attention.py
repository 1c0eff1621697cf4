"""MASA: atoms by principal components, low rank where inputs see it, one copy in every form of the program."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sylvester as sv
from sylvester.compiler import quantized_ops  # noqa: F401
from sylvester.compiler.errors import CompileError
from sylvester.compiler.gram import Whitening
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.resolve import resolve_passes
from sylvester.passes.atoms import allocate, low_rank, principal_atoms
from sylvester.passes.equalize import Equalize
from sylvester.passes.fold_constants import FoldConstants
from sylvester.passes.fold_norms import FoldNorms
from sylvester.passes.quantize import Quantize
from sylvester.passes.share_attention import ShareAttention
from sylvester.passes.share_basis import ShareBasis
from sylvester.passes.split_linears import SplitLinears
from tests import zoo
from tests.programs import ops
from tests.sharing import BLOCKS, WIDTH, Tower, inputs, tower

COMBINE, LINEAR = torch.ops.sylvester.combine.default, torch.ops.aten.linear.default


def applied(program, *passes):
    program, ledger = Pipeline(passes).run(program)
    return program, ledger.rows[-1]


def output(program: Program, x):
    return program.run("forward", {next(iter(program.main.examples)): x})[program.main.outputs[0].name]


def error(program: Program, other: Program, seed=5):
    return sum(float((output(program, x) - output(other, x)).square().sum()) for x in inputs(3, seed=seed))


def test_the_squared_error_is_the_sum_of_the_discarded_eigenvalues():
    torch.manual_seed(0)
    weights = [torch.randn(7, 5, dtype=torch.float64) for _ in range(6)]
    stacked = torch.stack([w.flatten() for w in weights])
    eigenvalues = torch.linalg.eigvalsh(stacked @ stacked.T)
    for count in range(1, 7):
        atoms, coefficients = principal_atoms(weights, count)
        assert atoms.shape == (count, 7, 5)
        torch.testing.assert_close(atoms.flatten(1) @ atoms.flatten(1).T, torch.eye(count, dtype=torch.float64))
        found = sum(
            (w - torch.tensordot(c, atoms, 1)).square().sum() for w, c in zip(weights, coefficients, strict=True)
        )
        assert found == pytest.approx(float(eigenvalues[: 6 - count].sum()), abs=1e-10)


def test_scales_weigh_the_layers():
    torch.manual_seed(0)
    weights = [torch.randn(4, 4) for _ in range(3)]
    atoms, coefficients = principal_atoms(weights, 1, [1e-6, 1.0, 1e-6])
    torch.testing.assert_close(torch.tensordot(coefficients[1], atoms, 1), weights[1].double(), atol=1e-3, rtol=0)


def test_equal_matrices_need_one_atom_and_zeros_none():
    atoms, coefficients = principal_atoms([torch.ones(3, 2)] * 3 + [torch.zeros(3, 2)], 2)
    assert atoms.isfinite().all()
    torch.testing.assert_close(torch.tensordot(coefficients, atoms, 1)[:3], torch.ones(3, 3, 2, dtype=torch.float64))
    assert float(torch.tensordot(coefficients, atoms, 1)[3].abs().max()) < 1e-12


def test_low_rank_lowers_the_error_of_the_outputs_most():
    torch.manual_seed(0)
    weight, x = (
        torch.randn(9, 6, dtype=torch.float64),
        torch.randn(50, 6, dtype=torch.float64) * torch.logspace(1, -1, 6),
    )
    whitening = Whitening(x.T @ x / 50)
    errors = {}
    for name, given in (("whitened", whitening), ("plain", Whitening(None))):
        left, right = low_rank(weight, given, 2)
        errors[name] = float(((weight - left @ right) @ x.T).square().sum())
    assert errors["whitened"] < errors["plain"]
    singular = torch.linalg.svdvals(weight @ x.T)
    assert errors["whitened"] == pytest.approx(float(singular[2:].square().sum()), rel=1e-9)


def test_ranks_go_where_they_gain_most_per_number():
    gains = [torch.tensor([9.0, 4.0, 1.0]), torch.tensor([8.0, 7.0, 0.0])]
    assert allocate(gains, [1, 1], 3) == [1, 2]
    assert allocate(gains, [1, 4], 5) == [2, 0]
    assert allocate(gains, [1, 1], 100) == [3, 2]
    assert allocate(gains, [1, 1], 0) == [0, 0]


@pytest.mark.parametrize("mode", ["load", "run"])
def test_as_many_atoms_as_blocks_change_nothing(mode):
    before = tower()
    after, row = applied(before, ShareAttention(atoms=4, mode=mode))
    assert row.error < 1e-5
    assert row.changes.counts() == {f"share {kind}": BLOCKS for kind in "qkvo"}
    for number, stem in itertools.product(range(BLOCKS), "abcd"):
        weights = {node: after.weights[node] for node in after.weights}
        atoms = next(t for key, t in weights.items() if key == f"blocks.0.{stem}.weight.atoms")
        made = torch.tensordot(weights[f"blocks.{number}.{stem}.weight.coefficients"], atoms, 1)
        torch.testing.assert_close(made, before.weights[f"blocks.{number}.{stem}.weight"], atol=1e-5, rtol=0)


def test_kinds_are_told_apart_by_dataflow_and_the_graph_is_what_it_says():
    program, row = applied(tower(), ShareAttention(atoms=1, group_size=2, kinds=("k",)))
    assert {item.where for item in row.changes.applied} == {f"blocks.{n}.b.weight" for n in range(BLOCKS)}
    made = program.main.calls(COMBINE)
    assert len(made) == BLOCKS
    assert all(next(iter(node.users)).target is LINEAR for node in made)
    assert [key for key in program.weights if key.endswith("atoms")] == [
        "blocks.0.b.weight.atoms",
        "blocks.2.b.weight.atoms",
    ]
    assert ops(program).count("aten.linear") == ops(tower()).count("aten.linear")


def test_the_error_falls_with_atoms_and_with_rank():
    program = tower(samples=4)
    by_atoms = [error(program, applied(program, ShareAttention(atoms=n))[0]) for n in (1, 2, 3, 4)]
    by_rank = [error(program, applied(program, ShareAttention(atoms=1, refine_rank=r))[0]) for r in (0, 2, 5, 9)]
    assert by_atoms == sorted(by_atoms, reverse=True)
    assert by_atoms[3] < 1e-6 * by_atoms[0]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[3] < 0.3 * by_rank[0]


def test_refinement_beats_more_atoms_at_equal_parameters():
    program = tower(samples=4)
    plain, _ = applied(program, ShareAttention(atoms=2))
    refined, _ = applied(program, ShareAttention(atoms=1, refine_rank=2))
    assert refined.weights.nbytes <= plain.weights.nbytes
    assert error(program, refined) < error(program, plain)


@pytest.mark.parametrize("mode", ["load", "run"])
def test_stored_bytes_are_the_formula(mode):
    before = tower(samples=2)
    after, _ = applied(before, ShareAttention(atoms=1, refine_rank=2, groups=((0, 1), (2, 3)), mode=mode))
    groups, dense = 2, 4 * BLOCKS * WIDTH * WIDTH
    atoms = 4 * groups * (WIDTH * WIDTH + 2)
    rank = 4 * BLOCKS * 2 * 2 * WIDTH
    assert after.weights.nbytes == pytest.approx(before.weights.nbytes - 4 * (dense - atoms - rank), rel=0.01)


def test_a_saved_program_keeps_one_copy(tmp_path):
    program, _ = applied(tower(), ShareAttention(atoms=1))
    program.save(tmp_path / "p")
    again = Program.load(tmp_path / "p")
    size = sum(file.stat().st_size for file in (tmp_path / "p").glob("*.safetensors"))
    assert again.weights.nbytes == program.weights.nbytes
    assert size < tower().weights.nbytes
    x = inputs(1)[0]
    torch.testing.assert_close(output(again, x), output(program, x))


def test_both_modes_compute_the_same():
    program = tower(samples=2)
    options = {"atoms": 2, "refine_rank": 3}
    load, run = (applied(program, ShareAttention(**options, mode=mode))[0] for mode in ("load", "run"))
    x = inputs(1)[0]
    expected = output(run, x)
    assert float((output(load, x) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_part_to_remove_chooses_atoms_and_rank():
    program = tower(samples=3)
    after, row = applied(program, ShareAttention(remove=0.3))
    attention = 4 * BLOCKS * WIDTH * WIDTH
    removed = (program.weights.nbytes - after.weights.nbytes) / 4 / attention
    assert 0.3 <= removed < 0.36
    assert sum(note.startswith("tried ") for note in row.changes.notes) > 1
    uniform, _ = applied(program, ShareAttention(remove=0.3, atoms=2, group_size=4))
    assert error(program, after, seed=1) <= 1.01 * error(program, uniform, seed=1)


def test_more_than_atoms_allow_cannot_be_removed():
    with pytest.raises(CompileError, match=r"atoms alone leave at most 0\.7"):
        applied(tower(), ShareAttention(remove=0.9))


def test_groups_are_those_given():
    program, row = applied(tower(), ShareAttention(atoms=1, groups=((0, 2), (1, 3)), kinds=("o",)))
    assert sum(key.endswith("atoms") for key in program.weights) == 2
    assert any("blocks 0+2, 1+3" in note for note in row.changes.notes)


def test_blocks_in_no_group_stay():
    program, row = applied(tower(), ShareAttention(atoms=1, groups=((1, 2),)))
    assert row.changes.counts() == dict.fromkeys(("share q", "share k", "share v", "share o"), 2)
    assert "blocks.0.a.weight" in program.weights


def test_layers_that_became_something_are_reported():
    _, row = applied(tower(samples=2), ShareAttention(atoms=1, refine_rank=1))
    assert len(row.changes.layers) == BLOCKS
    assert {item.part for item in row.changes.layers} == {"attention"}
    assert all(item.what.startswith("shares 1 atom") for item in row.changes.layers)


def test_without_data_the_ledger_says_so():
    _, row = applied(tower(), ShareAttention())
    assert any("no calibration data" in note for note in row.changes.notes)


def test_folding_constants_does_not_make_the_matrices():
    program, _ = applied(tower(), ShareAttention(atoms=1), FoldConstants(limit=1 << 30))
    assert len(program.main.calls(COMBINE)) == 4 * BLOCKS


def test_a_combined_weight_is_not_quantised_and_thin_layers_are():
    program, row = applied(
        tower(samples=2), ShareAttention(atoms=1, refine_rank=4, mode="run"), Quantize(weights=16, activations=None)
    )
    reasons = [item.reason for item in row.changes.refused]
    assert sum("is computed, expected a stored one" in reason for reason in reasons) == 4 * BLOCKS
    assert program.weights["blocks.0.a.weight.atoms"].dtype == torch.float32
    assert any("left.bf16" in key or "right.bf16" in key for key in program.weights)


def test_exact_passes_run_after_it():
    case = zoo.case("bert")
    program = zoo.traced(case.name).clone()
    _, ledger = Pipeline((ShareAttention(atoms=2), SplitLinears(), Equalize(), FoldNorms())).run(program)
    assert all(row.error is None or row.error < 1e-5 for row in ledger.rows[1:])


class Tied(nn.Module):
    """A tower one of whose weights is also a table, or also another layer."""

    def __init__(self, table):
        super().__init__()
        self.tower, self.table = Tower(), table

    def forward(self, x):
        weight = self.tower.blocks[1].a.weight
        y = self.tower(x)
        return y + F.embedding((x[..., 0] > 0).long(), weight) if self.table else F.linear(y, weight)


@pytest.mark.parametrize(
    ("table", "reason"), [(True, "is read elsewhere too"), (False, "is read by more than one layer")]
)
def test_a_weight_that_something_else_reads_is_refused(table, reason):
    program = sv.trace(Tied(table).eval(), (torch.randn(2, 5, WIDTH),))
    program, row = applied(program, ShareAttention(atoms=1))
    assert row.changes.counts()["share q"] == BLOCKS - 1
    assert [item.reason for item in row.changes.refused] == [f"tower.blocks.1.a.weight {reason}"]
    assert "tower.blocks.1.a.weight" in program.weights


def test_layers_that_share_already_are_refused():
    program, _ = applied(tower(), ShareAttention(atoms=1))
    _, row = applied(program, ShareAttention(atoms=1))
    assert not row.changes.applied
    assert {item.reason for item in row.changes.refused} >= {"the weight is computed, expected a stored one"}


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_models_without_attention(name):
    case = zoo.case(name)
    program = zoo.traced(case.name).clone()
    if name == "mlp":
        with pytest.raises(CompileError, match="no repeated blocks"):
            applied(program, ShareAttention())
        return
    _, row = applied(program, ShareAttention())
    assert row.changes.refused[0].reason == "no attention layer of repeated blocks can share its weight"


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"atoms": 0}, ValueError, "atoms is 0"),
        ({"atoms": 1.5}, TypeError, "atoms is 1.5"),
        ({"atoms": 3, "group_size": 2}, ValueError, "more than the 2 blocks"),
        ({"atoms": 3, "groups": ((0, 1),)}, ValueError, "more than the 2 blocks"),
        ({"refine_rank": -1}, ValueError, "refine_rank is -1"),
        ({"remove": 1.0}, ValueError, "remove is 1.0"),
        ({"remove": "a"}, TypeError, "remove is 'a'"),
        ({"remove": 0.2, "refine_rank": 3}, ValueError, "exclude each other"),
        ({"groups": ((0, 1),), "group_size": 2}, ValueError, "exclude each other"),
        ({"groups": ((0, 1), (1, 2))}, ValueError, "no block twice"),
        ({"groups": (0, 1)}, TypeError, "groups is"),
        ({"kinds": ("q", "x")}, ValueError, "kinds is"),
        ({"kinds": "q"}, TypeError, "kinds is"),
        ({"mode": "lazy"}, ValueError, "mode is 'lazy'"),
    ],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind, match=text):
        ShareAttention(**options)


def test_what_the_program_does_not_have():
    with pytest.raises(CompileError, match="atoms is 5, the program has 4 equal blocks"):
        applied(tower(), ShareAttention(atoms=5))
    with pytest.raises(CompileError, match=r"groups name block 7, the program has blocks 0 \.\. 3"):
        applied(tower(), ShareAttention(groups=((0, 7),)))


def test_groups_do_not_cross_stacks():
    case = zoo.case("t5")
    with pytest.raises(CompileError, match="two stacks"):
        applied(zoo.traced(case.name).clone(), ShareAttention(groups=((2, 3),)))


class Convolved(nn.Module):
    """A block whose queries come from a convolution over one position."""

    def __init__(self):
        super().__init__()
        self.a, self.rest = nn.Conv1d(WIDTH, WIDTH, 1), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q = self.a(x.transpose(1, 2)).transpose(1, 2)
        k, v = (layer(x) for layer in self.rest[:2])
        return x + self.rest[2](F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q, k, v))).squeeze(1))


def test_convolutions_and_layers_of_low_bits_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(*(Convolved() for _ in range(3))).eval()
    _, row = applied(sv.trace(model, (torch.randn(2, 5, WIDTH),)), ShareAttention(atoms=1))
    assert row.changes.counts() == {"share k": 3, "share v": 3, "share o": 3}
    assert len(row.changes.refused) == 3
    _, row = applied(tower(), Quantize(weights=8), ShareAttention(atoms=1))
    assert not row.changes.applied
    reasons = [item.reason for item in row.changes.refused]
    assert reasons.count("a convolution or a layer of low bits, expected a linear layer in float32") == 4 * BLOCKS


def test_its_text_rebuilds_it():
    for share in (
        ShareAttention(atoms=1, groups=((0, 1), (2, 3)), mode="run"),
        ShareAttention(remove=0.25, kinds=("q", "k")),
        ShareBasis(ratio=0.3, private=(), update=True),
    ):
        assert resolve_passes(str(share)) == (share,)
