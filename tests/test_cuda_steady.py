"""Artefacts for GPUs that verify drafts: tokens that are read together have the bits of single ones."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.backends.cuda.emulated import Emulated
from sylvester.codegen.gpu_plan import gpu_entries
from sylvester.codegen.gpu_products import STEADY
from sylvester.compiler.acceptance import Policy
from sylvester.compiler.drafts import NGramDrafter
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.proposal import Draft as Proposal
from sylvester.compiler.session import Session
from sylvester.compiler.stages import DRAFT
from sylvester.passes.draft import Draft
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


def test_other_programs_read_few_rows_by_kernels_of_their_own():
    program = cuda_models.program().clone()
    assert "gemv" in {launch.kernel.function for launch in gpu_entries(program)["decode"].launches}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees") / "made"
    saved = cuda_models.saved(cuda_models.program(), folder, draft=["ngram", "tree"])
    with cuda_models.opened(saved, Emulated()) as made:
        yield made


def test_tokens_of_a_tree_have_the_bits_of_single_ones(trees):
    """And those that come after its path, whose keys and values have moved."""
    tokens, depths = cuda_models.ids(1, 8), [0, 1, 2, 1, 2]
    one, other = (Session.begin(trees._runner, tokens[:, :3]) for _ in range(2))
    for session in (one, other):
        session.feed(tokens[:, :3])
    together = np.asarray(one.branch("tree", tokens[:, 3:], depths))
    path = [0, 3, 4]
    one.keep(3, path)
    one.rewind(6)
    for place in path:
        found = np.asarray(other.score(tokens[:, 3 + place : 4 + place]))
        np.testing.assert_array_equal(found[:, 0], together[:, place])
    assert one.tokens.tolist() == other.tokens.tolist()
    after = [np.asarray(session.score(tokens[:, :2])) for session in (one, other)]
    np.testing.assert_array_equal(*after)


@pytest.mark.nightly
def test_trees_give_the_same_text(trees, monkeypatch):
    """Drafts of several continuations, of which one goes on."""
    prompt, read = cuda_models.ids(1, 3), []
    plain = trees.generate(prompt, 6, draft=False).tolist()[0]

    def branch(session, entry, tokens, depths, real=Session.branch):
        read.append(list(depths))
        return real(session, entry, tokens, depths)

    def propose(drafter, session, last, most, *_):
        draft, held = Proposal(), session.position + 1
        for token in (7, plain[held], 9) if most > 2 and held < len(plain) else ():
            draft.add(drafter.policy, np.array([token]), 1, 0)
        return draft

    monkeypatch.setattr(Policy, "allowed", lambda _: True)
    monkeypatch.setattr(Session, "branch", branch)
    monkeypatch.setattr(NGramDrafter, "propose", propose)
    assert trees.generate(prompt, 6).tolist()[0] == plain
    assert read
    assert all(depths == [0, 1, 1, 1] for depths in read)
    assert trees.drafting.accepted > 0


def test_one_kernel_attends_over_texts_and_trees():
    entries = gpu_entries(Pipeline((Draft(ngram=True, tree=True),))(cuda_models.program().clone()))
    few = [
        {x.kernel.key for x in entries[name].launches if x.when and x.when[2] == 16 and "depths" in x.kernel.types}
        for name in ("decode", "tree")
    ]
    assert few[0]
    assert few[0] == few[1]


def test_drafts_are_refused_by_artefacts_that_were_compiled_without():
    with (
        cuda_models.opened(cuda_models.folder(), Emulated()) as compiled,
        pytest.raises(Unsupported, match="cannot verify drafts"),
    ):
        compiled.generate(cuda_models.ids(1, 3), 2, draft="ngram")
