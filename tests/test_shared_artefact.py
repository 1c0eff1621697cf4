"""An artefact of a program with shared weights: the file holds atoms once, loading makes the matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.backends.derived import derive, stored_names, with_derived
from sylvester.backends.resident import resident
from sylvester.backends.tensor_file import map_tensors
from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.manifest import DerivedSpec, SumSpec, read
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.target import Target, host_architecture
from sylvester.passes.share_attention import ShareAttention
from sylvester.passes.share_basis import ShareBasis
from tests import zoo
from tests.sharing import BLOCKS, WIDTH, inputs, tower

ISA = ("scalar", "neon")[host_architecture() == "aarch64"]
TARGET = Target("cpu", isas=(ISA,))


def shared(*passes, samples=2):
    program = tower(samples=samples)
    return Pipeline(passes, check=False)(program)


def agree(program, compiled, seed=3):
    name, entry = next(iter(program.main.examples)), program.main
    for x in inputs(2, seed=seed):
        expected = program.run("forward", {name: x})[entry.outputs[0].name]
        assert float((compiled(x) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["load", "run"])
def test_an_artefact_computes_what_the_program_does(mode, tmp_path):
    program = shared(ShareAttention(atoms=1, refine_rank=2, group_size=2, mode=mode))
    compiled = sv.compile(program, target=TARGET)
    agree(program, compiled)
    compiled.save(tmp_path / "a")
    agree(program, sv.load(tmp_path / "a"))
    assert bool(read(tmp_path / "a").derived) == (mode == "load")


def test_the_file_holds_what_the_program_does(tmp_path):
    program = shared(ShareAttention(atoms=1, refine_rank=1))
    sv.compile(program, target=TARGET).save(tmp_path / "a")
    stored = sum(array.nbytes for array in map_tensors(tmp_path / "a" / "weights.safetensors").values())
    assert stored == pytest.approx(program.weights.nbytes, rel=0.01)
    assert stored < tower().weights.nbytes - 0.6 * 4 * 4 * BLOCKS * WIDTH * WIDTH


def test_atoms_are_stored_once_where_they_are_combined_at_every_call(tmp_path):
    program = shared(ShareAttention(atoms=1, mode="run"))
    sv.compile(program, target=TARGET).save(tmp_path / "a")
    stored = map_tensors(tmp_path / "a" / "weights.safetensors")
    assert sum(array.nbytes for array in stored.values()) == pytest.approx(program.weights.nbytes, rel=0.01)
    assert sum(".atoms" in name for name in stored) == 4


def test_layers_that_share_run_beside_those_that_do_not(tmp_path):
    program = shared(ShareAttention(atoms=2, kinds=("q", "o")))
    compiled = sv.compile(program, target=TARGET)
    agree(program, compiled)
    compiled.save(tmp_path / "a")
    parts = [part for spec in read(tmp_path / "a").derived.values() for part in spec.parts]
    assert sum(bool(part.atoms) for part in parts) == 2 * BLOCKS
    assert sum(bool(part.weight) for part in parts) == 2 * BLOCKS


def test_a_language_model_with_caches():
    case = zoo.case("llama-gqa")
    program = zoo.traced(case.name).clone()
    program = Pipeline((ShareAttention(atoms=2, refine_rank=3),), check=False)(program)
    compiled = sv.compile(program, target=TARGET)
    reference = sv.compile(program, target="reference")
    tokens = case.inputs["input_ids"][:1]
    torch.testing.assert_close(compiled(tokens), reference(tokens), atol=1e-3, rtol=1e-3)
    assert np.array_equal(compiled.generate(tokens, max_new_tokens=4), reference.generate(tokens, max_new_tokens=4))


def test_a_shared_basis_is_stored_once(tmp_path):
    program = shared(ShareBasis(kinds=("q", "k", "up")))
    compiled = sv.compile(program, target=TARGET)
    agree(program, compiled)
    compiled.save(tmp_path / "a")
    names = {name for entry in read(tmp_path / "a").entries.values() for name in entry.weights}
    bases = [key for name in names for key in name.split("@")[0].split("+") if key.endswith("basis")]
    assert sorted(bases) == sorted(key for key in program.weights if key.endswith("basis"))


def test_a_file_without_the_atoms_is_an_error(tmp_path):
    folder = tmp_path / "a"
    sv.compile(shared(ShareAttention(atoms=1)), target=TARGET).save(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    next(iter(manifest["derived"].values()))["parts"][0]["atoms"] = "gone"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="has no tensor 'gone'"):
        sv.load(folder)


def test_panels_of_odd_sizes():
    random = np.random.default_rng(0)
    stored = {
        "a": random.standard_normal((3, 37, 5)).astype(np.float32),
        "c": random.standard_normal(3).astype(np.float32),
        "l": random.standard_normal((37, 2)).astype(np.float32),
        "r": random.standard_normal((2, 5)).astype(np.float32),
        "w": random.standard_normal((9, 5)).astype(np.float32),
    }
    wide = {name: array.astype(np.float64) for name, array in stored.items()}
    total = np.einsum("s,snk->nk", wide["c"], wide["a"]) + wide["l"] @ wide["r"]
    part, other = SumSpec("", "a", "c", "l", "r"), SumSpec("w")
    panels = derive(DerivedSpec((part, other)), stored)
    rows = panels.transpose(0, 2, 1).reshape(-1, 5)
    np.testing.assert_allclose(rows[:46], np.concatenate([total, wide["w"]]), rtol=1e-5, atol=1e-5)
    assert not rows[46:].any()
    assert panels.shape == (2, 5, 32)
    assert panels.ctypes.data % 64 == 0
    turns = derive(DerivedSpec((part, part), ways=2), stored)
    np.testing.assert_array_equal(turns[0], turns[1])
    np.testing.assert_allclose(derive(DerivedSpec((part,), panels=False), stored), total, rtol=1e-5, atol=1e-5)


def test_only_what_is_read_is_kept():
    program = shared(ShareAttention(atoms=1, group_size=4))
    lasting = resident(program)
    assert not lasting.program.main.calls(torch.ops.sylvester.combine.default)
    assert program.main.calls(torch.ops.sylvester.combine.default)
    assert len(lasting.sums) == 4 * BLOCKS
    assert all(lasting.program.weights[key].is_meta for key in lasting.sums)


def test_a_program_without_sums_is_left_alone():
    program = tower()
    assert resident(program).program is program
    program = shared(ShareAttention(atoms=1, mode="run"))
    assert resident(program).program is program


def test_names_and_tensors_of_a_manifest(tmp_path):
    sv.compile(shared(ShareAttention(atoms=1)), target=TARGET).save(tmp_path / "a")
    manifest = read(tmp_path / "a")
    names = stored_names(manifest)
    assert not names & set(manifest.derived)
    assert {"blocks.0.a.weight.atoms", "blocks.3.a.weight.coefficients"} <= names
    blank = {name: np.zeros((1, 32, 32) if name.endswith("atoms") else (1,), np.float32) for name in names}
    found = with_derived(manifest, blank)
    assert set(found) == {name for entry in manifest.entries.values() for name in entry.weights}
