"""The driver: one list of stages, names resolved, options refused, and the two backends that need no toolchain."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import sylvester as sv
from sylvester.compiler import registry
from sylvester.compiler.changes import Changes
from sylvester.compiler.driver import resolve_passes
from sylvester.compiler.errors import CompileError, InputError, Unsupported
from sylvester.compiler.manifest import DraftSpec, read_verified
from sylvester.compiler.pipeline import Pass
from sylvester.passes import Draft, Quantize
from tests import zoo


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, scale):
        hidden = torch.relu(self.first(x)) * scale
        return {"hidden": hidden, "y": self.second(hidden)}


def tiny():
    torch.manual_seed(0)
    return Tiny().eval(), {"x": torch.randn(3, 5, 6), "scale": torch.rand(8)}


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply a bias by a factor."""

    name: ClassVar[str] = "scale"
    contract: ClassVar = "lossy"
    by: float = 1.0

    def run(self, program):
        key = next(key for key in program.weights if "second" in key and "bias" in key)
        program.weights[key] = program.weights[key] * self.by
        changes = Changes()
        changes.apply("scale", key)
        return changes


def test_reference_backend_computes_what_the_model_computes():
    model, inputs = tiny()

    with sv.compile(model, inputs, target="reference") as compiled:
        other = {"x": torch.randn(2, 7, 6), "scale": inputs["scale"]}
        found, expected = compiled(**other), model(**other)

    assert list(found) == ["hidden", "y"]
    torch.testing.assert_close(found.y, expected["y"])
    torch.testing.assert_close(found["hidden"], expected["hidden"])


def test_numpy_through_the_reference_backend():
    model, inputs = tiny()

    with sv.compile(model, inputs, target="reference") as compiled:
        found = compiled(inputs["x"].numpy(), inputs["scale"].numpy())

    np.testing.assert_allclose(found.y, model(**inputs)["y"].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_again(tmp_path):
    model, inputs = tiny()

    with sv.compile(model, inputs, target="reference") as compiled:
        expected, out = compiled(**inputs), compiled.save(tmp_path / "out")

    with sv.load(out) as again:
        torch.testing.assert_close(again(**inputs).y, expected.y)
        assert again.ledger == compiled.ledger
        assert "canonicalize" in again.ledger


def test_temporary_folder_goes_with_the_object(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, inputs = tiny()

    compiled = sv.compile(model, inputs, target="null")
    assert len(list(tmp_path.iterdir())) == 1
    compiled.close()

    assert list(tmp_path.iterdir()) == []


def test_failed_build_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, inputs = tiny()

    def fail(*_):
        raise Unsupported("no")

    monkeypatch.setattr("sylvester.backends.null.Null.build", fail)
    with pytest.raises(Unsupported):
        sv.compile(model, inputs, target="null")

    assert list(tmp_path.iterdir()) == []


def test_symbols_and_fixed_sizes_reach_the_manifest():
    model, inputs = tiny()

    with sv.compile(model, inputs, target="null") as compiled:
        spec = compiled.manifest.entries["forward"]

    batch, length = (symbol.name for symbol in spec.symbols)
    shapes = {s.name: set(map(str, s.shape)) for s in (*spec.inputs, *spec.outputs)}
    assert shapes["x"] == {batch, length, "6"}
    assert shapes["y"] == {batch, length, "4"}
    assert [s.min for s in spec.symbols] == [1, 1]


def test_wrong_shapes_are_refused_by_name():
    model, inputs = tiny()

    with sv.compile(model, inputs, target="reference") as compiled:
        with pytest.raises(InputError, match=r"'x' has shape \[3, 5, 7\], expected \[3, 5, 6\]"):
            compiled(torch.randn(3, 5, 7), inputs["scale"])
        with pytest.raises(InputError, match="'scale' has dtype float64, expected float32"):
            compiled(inputs["x"], inputs["scale"].double())


def test_null_target_never_runs():
    model, inputs = tiny()

    with sv.compile(model, inputs, target="null") as compiled, pytest.raises(Unsupported, match="has no code to run"):
        compiled(**inputs)


def test_passes_of_the_caller_are_applied_and_recorded():
    model, inputs = tiny()

    with sv.compile(model, inputs, target="reference", passes=[Scale(by=2.0), "canonicalize"]) as compiled:
        found = compiled(**inputs).y
        assert compiled.manifest.passes == ("scale(by=2.0)", "canonicalize")
        assert "scale(by=2.0): scale x1" in compiled.ledger

    torch.testing.assert_close(found, model(**inputs)["y"] + model.second.bias)


def test_a_program_is_compiled_as_it_is():
    model, inputs = tiny()
    program = sv.trace(model, inputs)
    before = str(program)

    with sv.compile(program, target="reference") as compiled:
        torch.testing.assert_close(compiled(**inputs).y, model(**inputs)["y"])

    assert str(program) == before


def test_progress_names_the_stages():
    model, inputs = tiny()
    seen = []

    sv.compile(model, inputs, target="null", progress=lambda *step: seen.append(step)).close()

    assert seen[0] == ("trace", 0, 1)
    assert any(stage.startswith("pass canonicalize") for stage, _, _ in seen)
    assert all(0 <= done <= total for _, done, total in seen)


@pytest.mark.parametrize(
    ("draft", "entries", "spec"),
    [
        ("ngram", {"prefill", "decode", "start"}, DraftSpec("", True)),
        ("skip-layers(layers=(1,))", {"prefill", "decode", "start", "draft"}, DraftSpec("draft", False)),
        ([Quantize(weights=4), "ngram"], {"prefill", "decode", "start", "draft"}, DraftSpec("draft", True)),
        (
            "skip-layers(layers=(1,)), ngram, tree",
            {"prefill", "decode", "start", "tree", "draft"},
            DraftSpec("draft", True, "tree"),
        ),
    ],
)
def test_what_drafts_is_made_last_and_recorded(draft, entries, spec):
    case = zoo.case("llama-gqa")

    with sv.compile(case.model, case.inputs, target="null", passes="fold-norms", draft=draft) as compiled:
        assert set(compiled.entries) == entries
        assert compiled.manifest.generation.draft == spec
        first, last = compiled.manifest.passes
        assert (first, last.partition("(")[0]) == ("fold-norms", "draft")
        assert ("ngram" in last) == spec.ngram
        assert last in compiled.ledger


def test_nothing_drafts_unless_asked():
    case = zoo.case("llama-gqa")

    with sv.compile(case.model, case.inputs, target="null") as compiled:
        assert compiled.manifest.generation.draft is None
        assert "draft" not in compiled.entries


@pytest.mark.parametrize(
    ("draft", "message", "hint"),
    [
        ("", "draft names nothing that drafts", "or 'ngram'"),
        (" , ", "draft names nothing that drafts", "or 'ngram'"),
        ([], "draft names nothing that drafts", "or 'ngram'"),
        (["ngram", ""], "draft names nothing that drafts", "or 'ngram'"),
        ("skip-layer(layers=(1,))", "no pass named 'skip-layer'", "did you mean 'skip-layers'"),
        (["quantize(weights=4)", "n-grams"], "no pass named 'n-grams'", "did you mean 'ngram'?"),
        ("skip-layers, ngram", "cannot read the pass 'skip-layers': give either speedup or layers", "speedup"),
        ("draft(ngram=True)", "draft holds draft(ngram), which adds a draft itself", "give its steps"),
        ([Draft((Quantize(),)), "ngram"], "which adds a draft itself", "give its steps"),
    ],
)
def test_what_cannot_draft_is_refused_before_the_model_is_read(draft, message, hint):
    with pytest.raises(CompileError) as error:
        sv.compile("no such model", target="null", draft=draft)

    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Quantize, r"draft holds the class Quantize, expected an instance: Quantize\(\)"),
        ([1, "ngram"], "draft holds 1, expected texts .* None for none"),
        (True, "draft holds True, expected texts"),
    ],
)
def test_a_draft_of_another_type_is_refused(draft, message):
    with pytest.raises(TypeError, match=message):
        sv.compile("no such model", target="null", draft=draft)


def test_one_pass_drafts():
    case = zoo.case("llama-gqa")

    with pytest.raises(CompileError, match="the program drafts already") as error:
        sv.compile(case.model, case.inputs, target="null", passes=[Draft(ngram=True)], draft="ngram")

    assert "give all that drafts in one pass" in error.value.hint


def test_a_model_that_does_not_decode_takes_no_draft():
    model, inputs = tiny()

    with pytest.raises(Unsupported, match=r"needs an entry 'decode', the program has \['forward'\]"):
        sv.compile(model, inputs, target="null", draft="ngram")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"target": "vulkan"}, "no target named 'vulkan'", "there are"),
        ({"target": "refrence"}, "no target named 'refrence'", "did you mean 'reference'?"),
        ({"target": "null", "passes": "raise-norm"}, "no pass named 'raise-norm'", "'raise-norms'"),
        ({"target": "null", "threads": 0}, "threads must be at least 1, found 0", ""),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(options, message, hint):
    model, inputs = tiny()

    with pytest.raises(CompileError) as error:
        sv.compile(model, inputs, **options)

    assert message in error.value.message
    assert hint in error.value.hint


def test_passes_resolve_from_one_name_or_many():
    one, two = resolve_passes("canonicalize"), resolve_passes([Scale(by=3.0), "raise-glu"])

    assert [p.name for p in (*one, *two)] == ["canonicalize", "scale", "raise-glu"]


def test_third_party_passes_come_from_entry_points(monkeypatch):
    point = metadata.EntryPoint("scale", f"{__name__}:Scale", "sylvester.passes")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])

    assert registry.table("passes")["scale"] == f"{__name__}:Scale"
    assert "canonicalize" in registry.table("passes")


@pytest.mark.parametrize("name", sorted(registry.table("passes")))
def test_every_registered_pass_is_named_as_registered(name):
    assert registry.lookup("passes", name).name == name
    assert getattr(sv.passes, registry.lookup("passes", name).__name__) is registry.lookup("passes", name)


@pytest.mark.parametrize("name", sorted(registry.table("targets")))
def test_every_target_has_a_backend_and_a_loader(name):
    assert registry.lookup("targets", name).name == name
    assert callable(registry.loader(name))


def test_causal_language_model_generates_on_the_reference_backend(tmp_path):
    case = zoo.case("llama-gqa")
    ids = case.inputs["input_ids"]

    with sv.compile(case.model, case.inputs, target=sv.Target("reference", max_length=32)) as compiled:
        assert set(compiled.entries) == {"prefill", "decode", "start"}
        found = compiled.generate(ids, max_new_tokens=6, stop=())
        logits = compiled(ids).logits
        with pytest.raises(InputError, match="above the compiled maximum of 32"):
            compiled.generate(ids, max_new_tokens=22)
        with pytest.raises(InputError, match="33 in dimension 1, above the compiled maximum of 32"):
            compiled(torch.ones((1, 33), dtype=torch.int64))

    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, case.model(expected).logits[:, -1:].argmax(-1)], 1)
        torch.testing.assert_close(logits, case.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert found.tolist() == expected.tolist()


def test_max_length_cannot_exceed_the_model():
    case = zoo.case("llama-gqa")

    with pytest.raises(CompileError, match="max_length is 4096, the model takes at most 128 tokens"):
        sv.compile(case.model, case.inputs, target=sv.Target("null", max_length=4096))


def test_folder_without_tokenizer_compiles_and_says_so_when_text_is_asked_for(tmp_path):
    case = zoo.case("llama-gqa")
    case.model.save_pretrained(tmp_path / "model")

    with sv.compile(tmp_path / "model", target="reference") as compiled:
        assert read_verified(compiled.save(tmp_path / "out")).generation is not None
        with pytest.raises(CompileError, match=r"no tokenizer\.json") as error:
            compiled.generate("Once upon a time")

    assert "give token ids" in error.value.hint


def test_importing_the_front_door_loads_nothing_heavy():
    script = "import sys, sylvester; dir(sylvester); sys.exit(bool({'torch', 'numpy', 'networkx'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_missing_file_is_named():
    with pytest.raises(CompileError, match="no file or folder"):
        sv.compile(Path("nowhere.pt2"), target="null")
