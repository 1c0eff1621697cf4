"""Recipes: what they expand to with and without calibration data, and that choices follow what was measured."""

from __future__ import annotations

import re

import pytest
import torch

import sylvester as sv
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.recipe import Machine, Recipe
from sylvester.compiler.registry import lookup, table
from sylvester.compiler.resolve import expand, resolve_passes, separated
from sylvester.passes import recipes
from sylvester.passes.choose_rotations import Choice, choose_rotations
from sylvester.passes.choose_widths import choose_widths
from sylvester.passes.equalize import Equalize
from sylvester.passes.fold_norms import FoldNorms
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.quantize_cache import QuantizeCache
from sylvester.passes.rotate_hadamard import RotateHadamard
from tests import zoo

WIDTH, HIDDEN, TOKENS = 64, 128, 9


class OutlierFfn(torch.nn.Module):
    """Hidden channels ten times the others, without effect in float: int4 rows need the rotation before `down`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH)
        with torch.no_grad():
            self.up.weight[:3] *= 10
            self.up.bias[:3] *= 10
            self.down.weight[:, :3] /= 10

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Even(Machine):
    """Every layer takes as long as any other."""

    def identity(self):
        return "even"

    def linears(self, shapes, bits):
        return {shape: dict.fromkeys(bits, 1.0) for shape in shapes}

    def steps(self, programs, entry, length):
        raise NotImplementedError

    def footprint(self, program):
        raise NotImplementedError


@pytest.fixture(scope="module")
def outliers():
    program = sv.trace(OutlierFfn(), (torch.randn(3, WIDTH),))
    torch.manual_seed(1)
    program.calibration = Calibration(tuple({"x": torch.randn(TOKENS, WIDTH)} for _ in range(3)))
    return program


@pytest.fixture(scope="module")
def language_model():
    case = zoo.case("llama-gqa")
    return sv.trace(case.model, case.inputs)


def test_every_recipe_can_be_named_and_says_what_it_does():
    for name in table("recipes"):
        recipe = lookup("recipes", name)
        assert isinstance(recipe, (tuple, Recipe))
        if isinstance(recipe, Recipe):
            assert recipe.name == name
            assert str(recipe.quantize) in recipe.summary()


def test_without_calibration_nothing_is_rotated_and_that_is_said(language_model):
    expansion = expand(resolve_passes("w4a8"), language_model, None)
    passes, notes = expansion.passes, expansion.notes
    assert passes == (Quantize(4, method="mse"), QuantizeCache(), QuantizeAttention())
    assert "without calibration data no rotation is tried" in notes[1]
    assert notes[0].startswith("recipe w4a8 is quantize(weights=4, method='mse'), quantize-cache")


def test_recipes_mix_with_passes(language_model):
    passes = expand(resolve_passes(["canonicalize", "w8a8", QuantizeAttention()]), language_model, None).passes
    names = [step.name for step in passes]
    assert names == ["canonicalize", "quantize", "quantize-cache", "quantize-attention", "quantize-attention"]


def test_a_rotation_that_lowers_the_loss_is_kept(outliers):
    choice = choose_rotations(outliers, Quantize(4, 4), ("residual", "ffn"))
    assert choice.passes == (RotateHadamard(residual=False, values=False, ffn=True),)
    assert any(note.startswith("rotation ffn kept: error") for note in choice.notes)
    assert _error(outliers, *choice.passes) < 0.9 * _error(outliers)


def test_a_weight_that_is_not_finite_is_named_as_it_came(outliers):
    broken = outliers.clone()
    broken.weights["up.weight"] = broken.weights["up.weight"].clone().index_fill_(0, torch.tensor(0), torch.inf)
    with pytest.raises(sv.CompileError, match=r"'up.weight' holds infinities"):
        choose_rotations(broken, Quantize(weights=4), ("equalize", "ffn"))


def test_equalising_is_tried_beside_rotations(outliers):
    choice = choose_rotations(outliers, Quantize(4, 4), ("equalize", "ffn"))
    assert any(isinstance(step, Equalize) for step in choice.passes)
    assert choice.notes[1].startswith("equalize kept: error")


def test_a_rotation_that_does_not_lower_the_loss_is_rejected(outliers):
    choice = choose_rotations(outliers, Quantize(16, None), ("values",))
    assert not choice.passes
    assert choice.notes[-1].startswith("rotation values rejected")


def _error(program, *rotations):
    passes = (*rotations, Quantize(4, 4))
    bare = program.clone()
    bare.calibration = None
    changed = Pipeline(passes, check=False)(bare)
    sample = program.calibration.fit[0]
    expected, found = (next(iter(p.run("forward", sample).values())) for p in (program, changed))
    return float((found - expected).norm() / expected.norm())


def test_widths_that_are_not_faster_are_widened(outliers):
    def speed(shapes, bits):
        return {shape: {4: 2.0 if shape[0] == WIDTH else 1.0, 8: 1.5} for shape in shapes}

    widths = choose_widths(outliers, 4, speed)
    assert widths.per_layer == {"down.weight": 8}
    assert widths.notes == (
        "int4 kept for 1 shapes of layers: 1.50-1.50x the speed of int8",
        "int4 rejected for down.weight [64, 128]: 0.75x the speed of int8",
    )


def test_float8_is_rotated_by_the_loss_and_keeps_its_width(outliers):
    expansion = expand(resolve_passes("fp8"), outliers, Even())
    assert expansion.passes[-3:] == (Quantize("fp8"), QuantizeCache(), QuantizeAttention())
    assert any("rotation ffn" in note for note in expansion.notes)
    assert not any("rejected for" in note for note in expansion.notes)


def test_a_recipe_with_calibration_uses_what_was_measured(outliers):
    expansion = expand(resolve_passes("w4a4"), outliers, Even())
    passes, notes = expansion.passes, expansion.notes

    assert any(isinstance(step, (RotateHadamard, Equalize)) for step in passes)
    quantize = next(step for step in passes if isinstance(step, Quantize))
    assert quantize.method == "gptq"
    assert quantize.per_layer == (("up.weight", 8), ("down.weight", "w8a8"), ("down.weight*", "w4a8"))
    assert sum("rejected for" in note for note in notes) == 2


def test_a_head_taken_off_its_table_keeps_rows_of_8_bits_when_it_gets_wider(monkeypatch):
    case = zoo.case("llama-tied")
    program = sv.trace(case.model, case.inputs)
    program.calibration = Calibration((dict(case.inputs),))
    monkeypatch.setattr(recipes, "choose_rotations", lambda *_: Choice((FoldNorms("split"),), ()))

    passes = expand(resolve_passes("w4a4"), program, Even()).passes

    quantize = next(step for step in passes if isinstance(step, Quantize))
    choices = dict(quantize.per_layer)
    head = next(key for key in choices if key.endswith(".head"))
    assert choices.pop(head) == "w8a8"
    assert choices.pop(f"{head.removesuffix('.head')}*") == "w4a8"
    assert set(choices.values()) == {8}


def test_a_recipe_compiles_to_the_target_and_the_report_lists_its_passes(outliers):
    samples = [(sample["x"],) for sample in outliers.calibration.fit]
    compiled = sv.compile(OutlierFfn(), (torch.randn(3, WIDTH),), passes="w4a4", calibration=samples)
    assert compiled.manifest.passes[-1] == "quantize-attention"
    assert any(note.startswith("recipe w4a4 is split-linears, equalize") for note in compiled.report["ledger"]["notes"])
    x = torch.randn(5, WIDTH)
    error = (compiled(x) - OutlierFfn()(x)).norm() / OutlierFfn()(x).norm()
    assert error < 0.3


@pytest.mark.parametrize(
    "step",
    [
        Quantize(4, None, group=32, method="mse", per_layer={"lm_head.*": 8, "*.0.*": "float"}, skip=("a",)),
        RotateHadamard(values=False, seed=3),
        QuantizeCache(bits=8),
    ],
)
def test_the_text_of_a_pass_rebuilds_it(step):
    assert resolve_passes(str(step)) == (step,)
    assert resolve_passes(separated(f"canonicalize, {step},w8a8"))[1] == step


def test_one_text_lists_several_passes():
    assert resolve_passes(" fold-norms, quantize(weights=4) ,w8a8") == resolve_passes(
        ["fold-norms", Quantize(weights=4), "w8a8"]
    )


@pytest.mark.parametrize("given", [None, 4, ["w4a8", 3], Quantize, [Quantize]])
def test_what_is_no_pass_is_an_error(given):
    with pytest.raises(TypeError, match=r"passes hold .*expected"):
        resolve_passes(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize(bits=4)", "no option 'bits'.* options are .*weights"),
        ("skip-layers", "cannot read the pass 'skip-layers': give either speedup or layers.* options are .*speedup"),
        ("quantize(method=gptq)", "method is gptq, expected a number, True, False or a quoted text"),
        ("w4a8(group=64)", "the recipe 'w4a8' takes no options"),
        ("quantize(4)", "options by name"),
        ("quantize(weights=5)", "weights is 5, expected one of"),
        ("quantize(weights=4", "never closed"),
        ("quantize(weights=open('x'))", "weights is open.*expected a number"),
    ],
)
def test_options_that_cannot_be_read_are_errors(text, message):
    with pytest.raises(sv.CompileError) as raised:
        resolve_passes(text)
    assert re.search(message, f"{raised.value.message} {raised.value.hint}")
