"""The supernet: a genome scored without rewriting is the program that its passes make."""

from __future__ import annotations

import pytest
import torch

import sylvester as sv
from sylvester.compiler import quality
from sylvester.compiler.divergence import Reference
from sylvester.compiler.genome import DROPPED, FLOAT, Genome, find_sites
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.supernet import Supernet
from sylvester.passes.rotate_hadamard import RotateHadamard
from sylvester.passes.search_weights import RoundedWeights
from sylvester.passes.search_world import SHORT, World
from tests import zoo
from tests.searching import language_model

MODELS = ("llama-tied", "gpt2", "gpt-neox")


@pytest.fixture(scope="module", params=MODELS)
def program(request):
    return language_model(request.param)


def net_of(program, method="rtn"):
    sites = find_sites(program)
    net = Supernet(program, sites, RoundedWeights(program, sites, method), program.calibration.fit)
    net.refer()
    return net


def genomes(sites):
    base = sites.genome()
    yield sites.genome(8)
    yield sites.genome(16)
    parts = [list(bits) for bits in base.parts]
    parts[1], parts[2], parts[3] = [DROPPED, 4], [8, DROPPED], [DROPPED, DROPPED]
    yield Genome(base.outer, tuple(map(tuple, parts)), base.shares)
    shared = Genome((FLOAT,) * len(base.outer), ((8, 4), (FLOAT, 8), (FLOAT, 8), (DROPPED, 3)), (0, 0, 1, 0))
    yield shared.normal()


def test_a_genome_scores_what_its_passes_make(program):
    net = net_of(program)
    world = World.of(program, "plain", ())
    bare = program.clone()
    bare.calibration = None
    for genome in genomes(net.sites):
        passes = tuple(step for step in world.realise(genome, method="rtn") if step not in SHORT)
        made = Pipeline(passes, check=False)(bare)
        found = quality.compare(program, made, program.calibration.fit)
        score = net.score(genome)
        assert score.mean == pytest.approx(found.kl, rel=0.01, abs=1e-7), str(genome)
        assert score.perplexity == pytest.approx(found.perplexity, rel=1e-3)


def test_a_kept_stream_changes_no_score(program):
    net = net_of(program)
    fresh = [net_of(program).score(genome) for genome in genomes(net.sites)]
    for anchor in (net.sites.genome(), *genomes(net.sites)):
        net.anchor(anchor)
        net.score(anchor)
        assert net._kept
        assert [net.score(genome) for genome in genomes(net.sites)] == fresh


def test_the_original_scores_nothing():
    program = language_model("llama-gqa")
    net = net_of(program)
    score = net.score(net.sites.genome())
    assert score.kl == 0
    assert score.perplexity == pytest.approx(quality.perplexity(program, program.calibration.fit), rel=1e-4)


def test_some_samples_are_scored_by_themselves():
    net = net_of(language_model("llama-gqa"))
    genome = net.sites.genome(4)
    parts = [net.score(genome, [i]) for i in range(len(net.samples))]
    assert sum(part.kl for part in parts) == pytest.approx(net.score(genome).kl)
    assert sum(part.positions for part in parts) == net.score(genome).positions


def test_a_rotated_program_is_compared_with_the_original():
    program = language_model("llama-gqa")
    net = net_of(program)
    turned = Pipeline((RotateHadamard(),), check=False)(program)
    other = net_of(turned)
    other.refer(net.references)
    assert other.score(other.sites.genome()).mean < 1e-6
    assert other.score(other.sites.genome(3)).mean > 1e-4


@pytest.mark.parametrize("vocabulary", [40, 900])
def test_the_likeliest_tokens_stand_for_all(vocabulary):
    before, after = 3 * torch.randn(50, vocabulary), 3 * torch.randn(50, vocabulary)
    wanted = torch.randint(vocabulary, (50,))
    whole, some = (Reference.of(before, wanted, every).score(after) for every in (True, False))
    expected = float(quality.kl_rows(before, after).sum())
    assert whole.kl == pytest.approx(expected, rel=1e-4)
    assert 0.9 * expected < some.kl <= expected * (1 + 1e-4)
    assert some.surprise == whole.surprise


def test_sites_follow_structure():
    sites = find_sites(language_model("llama-tied"))
    assert [str(site) for site in sites][:3] == ["head", "attention 0", "ffn 0"]
    assert all(len(site.keys) == (1 if site.block < 0 else 4 if site.kind == "attention" else 3) for site in sites)
    assert [sites.shareable(i, 1) for i in range(4)] == [False, True, True, True]
    assert not sites.shareable(1, 2)


def test_without_blocks_or_scores_there_is_nothing_to_search():
    mlp = zoo.case("mlp")
    with pytest.raises(sv.CompileError, match="no repeated residual blocks"):
        find_sites(sv.trace(mlp.model, mlp.inputs))
    bert = zoo.case("bert")
    program = sv.trace(bert.model, bert.inputs)
    with pytest.raises(sv.CompileError, match="scores no next token"):
        Supernet(program, find_sites(program), lambda key, bits: None, [])
