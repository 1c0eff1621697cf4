"""Artefacts for GPUs that verify drafts: tokens that are read together have the bits of single ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from sylvester.backends.cuda import backend, emulated
from sylvester.backends.cuda.emulated import Emulated
from sylvester.codegen.gpu_plan import gpu_entries
from sylvester.codegen.gpu_products import STEADY
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.session import Session
from sylvester.compiler.stages import DRAFT
from sylvester.compiler.target import Target
from tests import cuda_models


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = cuda_models.saved(cuda_models.program(), tmp_path_factory.mktemp("steady") / "made", draft="ngram")
    with cuda_models.opened(folder, Emulated()) as made:
        yield made


def test_tokens_read_together_have_the_bits_of_single_ones(compiled):
    tokens = cuda_models.ids(2, 7)
    one, other = (Session.begin(compiled._runner, tokens[:, :4]) for _ in range(2))
    for session in (one, other):
        session.feed(tokens[:, :4])
    together = np.asarray(one.score(tokens[:, 4:]))
    alone = [np.asarray(other.score(tokens[:, n : n + 1])) for n in range(4, 7)]
    np.testing.assert_array_equal(together, np.concatenate(alone, 1))


def test_drafts_give_the_same_text(compiled):
    prompt = np.tile(cuda_models.ids(1, 3), (1, 3))
    plain = compiled.generate(prompt, 5, draft=False).tolist()
    before = compiled.drafting.rounds
    assert compiled.generate(prompt, 5).tolist() == plain
    assert compiled.drafting.rounds > before


def test_one_kernel_is_for_all_few_rows():
    program = cuda_models.program().clone()
    program.info[DRAFT] = {"ngram": True}
    entries = gpu_entries(program)
    decode = entries["decode"].launches
    assert "gemv" not in {launch.kernel.function for launch in decode}
    limits = {launch.when[1:] for launch in decode if launch.when and launch.kernel.function == "matmul"}
    assert limits == set(STEADY)
    queries = {launch.when[1:] for launch in decode if launch.when and launch.kernel.function == "attention"}
    assert (1, 16) in queries
    assert "gemv" in {launch.kernel.function for launch in entries["start"].launches}


@pytest.mark.parametrize("info", [None, {"ngram": True, "tree": "tree"}])
def test_other_programs_read_few_rows_by_kernels_of_their_own(info):
    program = cuda_models.program().clone()
    if info:
        program.info[DRAFT] = info
    assert "gemv" in {launch.kernel.function for launch in gpu_entries(program)["decode"].launches}


def test_trees_are_noted():
    program = cuda_models.program().clone()
    program.info[DRAFT] = {"ngram": True, "tree": "tree"}
    made = backend.Cuda()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(backend, "build", emulated.build)
        manifest = made.build(program, Target("cuda", arch="sm_90"), Path(folder), lambda *_: None)
    assert backend.TREES in made.notes
    assert not manifest.generation.steady


def test_drafts_are_refused_by_artefacts_that_were_compiled_without():
    with (
        cuda_models.opened(cuda_models.folder(), Emulated()) as compiled,
        pytest.raises(Unsupported, match="cannot verify drafts"),
    ):
        compiled.generate(cuda_models.ids(1, 3), 2, draft="ngram")
