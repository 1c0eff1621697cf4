"""Programs with shared weights on GPUs: sums of atoms made when an artefact is loaded, or at every call."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sylvester as sv
from sylvester.backends.cuda.calls import arena_bytes
from sylvester.backends.cuda.emulated import Emulated
from sylvester.backends.cuda.simulated import Simulated
from sylvester.backends.tensor_file import map_tensors
from sylvester.codegen.gpu_plan import gpu_entries
from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.manifest import read
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.shared_ops import combine
from sylvester.passes.share_attention import ShareAttention
from sylvester.passes.share_basis import ShareBasis
from tests import cuda_models
from tests.programs import program
from tests.sharing import WIDTH, inputs, tower


def shared(*passes):
    return Pipeline(passes, check=False)(tower(samples=2))


def agree(made, compiled):
    name, entry = next(iter(made.main.examples)), made.main
    x = inputs(1, seed=3)[0]
    expected = made.run("forward", {name: x})[entry.outputs[0].name]
    assert float((torch.as_tensor(compiled(x)) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (3, 0), (18, 0), (3, 1), (2, 5), (17, 19)])
@pytest.mark.parametrize("rows", [1, 9])
def test_linear_layers_over_sums(count, rank, rows):
    n, k = 37, 21
    weights = {"atoms": torch.randn(count, n, k), "c": torch.randn(count), "b": torch.randn(n)}
    weights |= {"left": torch.randn(n, rank), "right": torch.randn(rank, k)} if rank else {}

    def layer(x, atoms, c, b, *factors):
        return F.linear(x, combine(atoms, c, *factors), b)

    x = torch.randn(rows, k)
    made = program(layer, x, weights=weights, axes=lambda _: ())
    found = Simulated(gpu_entries(made)["forward"], {**weights, "x0": x}, {}).run()
    wide = layer(x.double(), *(t.double() for t in weights.values()))
    torch.testing.assert_close(found["y0"].double(), wide, rtol=1e-4, atol=1e-4)


def test_a_product_adds_the_part_of_low_rank_to_the_sum():
    weights = {"a": torch.randn(2, 40, 24), "c": torch.randn(2), "p": torch.randn(40, 3), "q": torch.randn(3, 24)}
    made = program(lambda x, *w: F.linear(x, combine(*w)), torch.randn(1, 24), weights=weights)
    entry = gpu_entries(made)["forward"]
    assert [launch.kernel.function for launch in entry.launches] == ["loops", "loops", "matmul", "gemv"]
    assert entry.fusions[0].count == 1


@pytest.mark.parametrize("mode", ["load", "run"])
def test_an_artefact_computes_what_the_program_does(mode, tmp_path):
    made = shared(ShareAttention(atoms=1, refine_rank=2, group_size=2, mode=mode))
    folder = cuda_models.saved(made, tmp_path / "a")
    with cuda_models.opened(folder, Emulated()) as compiled:
        agree(made, compiled)
    assert bool(read(folder).derived) == (mode == "load")
    assert not any(spec.panels for spec in read(folder).derived.values())
    stored = sum(array.nbytes for array in map_tensors(folder / "weights.safetensors").values())
    assert stored == pytest.approx(made.weights.nbytes, rel=0.01)


@pytest.mark.nightly
def test_a_shared_basis_is_stored_once(tmp_path):
    made = shared(ShareBasis(kinds=("q", "k", "up")))
    folder = cuda_models.saved(made, tmp_path / "a")
    with cuda_models.opened(folder, Emulated()) as compiled:
        agree(made, compiled)
    bases = [name for name in map_tensors(folder / "weights.safetensors") if name.endswith("basis")]
    assert sorted(bases) == sorted(key for key in made.weights if key.endswith("basis"))


def test_matrices_that_a_loader_makes_are_weights_before_anything_is_copied(tmp_path):
    folder = cuda_models.saved(shared(ShareAttention(atoms=1)), tmp_path / "a")
    dense = tower().weights.nbytes
    assert sum(array.nbytes for array in map_tensors(folder / "weights.safetensors").values()) < 0.8 * dense
    device = Emulated(memory=dense)
    with pytest.raises(CompileError, match="this artefact takes"):
        cuda_models.opened(folder, device)
    assert not device.held


def test_matrices_of_every_call_are_among_its_tensors(tmp_path):
    needed = {}
    for mode in ("load", "run"):
        folder = cuda_models.saved(shared(ShareAttention(atoms=1, mode=mode)), tmp_path / mode)
        entry = json.loads((folder / "launches.json").read_text())["entries"]["forward"]
        needed[mode] = arena_bytes(entry, entry["hints"])
    assert needed["run"] >= needed["load"] + WIDTH * WIDTH * 4


def test_a_file_without_the_atoms_is_an_error(tmp_path):
    folder = cuda_models.saved(shared(ShareAttention(atoms=1)), tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    next(iter(manifest["derived"].values()))["parts"][0]["atoms"] = "gone"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="has no tensor 'gone'"):
        cuda_models.opened(folder, Emulated())


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["load", "run"])
def test_tokens_of_a_language_model(mode, tmp_path):
    sharing = ShareAttention(atoms=1, refine_rank=3, mode=mode)
    made = Pipeline((sharing,), check=False)(cuda_models.program(layers=2).clone())
    folder, prompt = cuda_models.saved(made, tmp_path / "a"), cuda_models.ids(1, 3)
    expected = sv.compile(made, target="reference").generate(prompt, max_new_tokens=2)
    with cuda_models.opened(folder, Emulated()) as compiled:
        assert np.array_equal(compiled.generate(prompt, max_new_tokens=2), expected)
