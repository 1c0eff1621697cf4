"""Drafts change how fast tokens come, and no token: n-grams, skipped layers, quantised substitutes, absurd ones."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.compiler.acceptance import ALLOWED, Policy, Rate, Reading
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.drafts import Drafters, NGramDrafter
from sylvester.compiler.errors import CompileError, InputError, Unsupported
from sylvester.compiler.ngrams import NGrams
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.proposal import Draft as Proposal
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import Session
from sylvester.compiler.speculation import QUERIES
from sylvester.compiler.token_tree import path_to
from sylvester.passes.draft import Draft
from tests import zoo
from tests.nightly import by_night

DRAFTS = {
    "ngram": "ngram",
    "skip": "skip-layers(speedup=2.0)",
    "first layer only": "skip-layers(layers=(1, 2, 3))",
    "no attention": sv.passes.DropSublayers(attention=(0, 1, 2, 3)),
    "quantised": "quantize(weights=4, group=32)",
    "both": ["quantize(weights=8)", "ngram"],
    "tree": ["ngram", "tree"],
}
WAYS = (
    {},
    {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    {"temperature": 1.3, "top_k": 20, "seed": 4},
    {"repetition_penalty": 1.4},
)


class Eager(Policy):
    """Drafts as much as it may, whatever comes of it."""

    def allowed(self) -> bool:
        return True

    def pays(self, drafted: int, expected: float, chance: float) -> bool:
        return True


@functools.cache
def compiled(name: str = "llama-gqa", draft: str = "ngram", passes: str = "") -> sv.Compiled:
    program = zoo.traced(name).clone()
    return sv.compile(program, draft=DRAFTS[draft], passes=passes or (), target=sv.Target(threads=2, isas=("avx2",)))


def eager(model: sv.Compiled) -> sv.Compiled:
    """Every call drafts to the end."""
    model._drafters = Drafters(model.manifest.generation.draft)
    for greedy in (True, False):
        drafter = model._drafters.find(None, greedy)
        parts = [drafter, *(getattr(drafter, part) for part in ("table", "model") if hasattr(drafter, part))]
        for part in parts:
            if hasattr(part, "policy"):
                part.policy = Eager()
        for part in parts[1:]:
            if hasattr(part, "policy"):
                part.policy = drafter.policy
    return model


def prompts(batch: int, length: int = 7) -> np.ndarray:
    return np.random.default_rng(batch).integers(3, zoo.VOCAB, (batch, length))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("batch", by_night([1, 4], [4]))
def test_tokens_are_those_of_plain_decoding(draft, batch):
    model = eager(compiled(draft=draft))
    for way in WAYS:
        given = dict(max_new_tokens=40, reuse=False, stop=(), **way)
        wanted = model.generate(prompts(batch), draft=False, **given)
        assert np.array_equal(model.generate(prompts(batch), **given), wanted), way
    assert model.drafting.drafted > 100
    assert model.drafting.made >= model.drafting.rounds


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gpt-neox", "gpt2", "gemma", "odd-names"])
def test_other_architectures(name):
    program = zoo.traced(name).clone()
    try:
        model = eager(sv.compile(program, draft="ngram", target=sv.Target(threads=1, isas=("avx2",))))
    except Unsupported as refusal:
        assert "drafts cannot be verified together" in str(refusal)  # noqa: PT017
        return
    given = {"max_new_tokens": 40, "reuse": False, "stop": ()}
    assert np.array_equal(model.generate(prompts(1), **given), model.generate(prompts(1), draft=False, **given))


@pytest.mark.parametrize("passes", ["", "bf16", "quantize(weights=8, activations=8)", "quantize-cache(bits=8)"])
def test_logits_of_several_tokens_are_those_of_one_by_one(passes):
    """Thousands of positions, in calls of every length that drafts may have."""
    model = compiled(passes=passes)
    runner, tokens = model._runner, np.random.default_rng(0).integers(3, zoo.VOCAB, (2, 61))
    one, many = (Session.begin(runner, tokens) for _ in range(2))
    for session in (one, many):
        session.feed(tokens[:, :5])
    wanted = np.stack([one.feed(tokens[:, i : i + 1]) for i in range(5, tokens.shape[1])], 1)
    for count in range(1, QUERIES + 1):
        many.rewind(5)
        while many.position + count <= tokens.shape[1]:
            at = many.position
            found = many.score(tokens[:, at : at + count])
            assert np.array_equal(found, wanted[:, at - 5 : at - 5 + count]), (count, at)
    for key, cache in one.state.arrays.items():
        assert np.array_equal(cache[:, :, :56], many.state.arrays[key][:, :, :56])


def test_text_streams_and_stops_within_a_call():
    model = eager(compiled())
    ids = model.generate(prompts(1), 40, reuse=False, stop=())[0]
    stop = (int(ids[20]),)
    end = 7 + [int(i) for i in ids[7:]].index(stop[0])
    found = list(model.generate(prompts(1), 40, stream=True, reuse=False, stop=stop))
    assert found == [int(i) for i in ids[7 : end + 1]]


def test_a_draft_shares_weights_and_caches_with_the_model():
    program = zoo.traced("llama-gqa").clone()
    drafted, ledger = Pipeline((Draft((sv.passes.SkipLayers(layers=(0, 3)),)),)).run(program)
    assert list(drafted.weights) == list(program.weights)
    assert drafted.state == program.state
    slots = {output.name for output in drafted.entries["draft"].outputs if output.kind == "state"}
    assert slots == {"k1", "v1", "k2", "v2"}
    assert ledger.rows[0].contract == "drafted"
    assert len(drafted.entries["draft"].calls()) < len(drafted.entries["decode"].calls())


def test_a_draft_of_other_caches_is_refused():
    program = zoo.traced("llama-gqa").clone()
    program.calibration = Calibration(tuple({"input_ids": torch.tensor(prompts(1, 20))} for _ in range(2)))
    for step, found in (
        (sv.passes.QuantizeCache(8), "the draft has caches of torch.uint8"),
        (sv.passes.RotateHadamard(), "changes what the cache 'k0' holds|changes what the cache 'v0' holds"),
    ):
        with pytest.raises(Unsupported, match=found):
            Pipeline((Draft((step,)),)).run(program)


def test_bad_drafts():
    program = zoo.traced("llama-gqa").clone()
    with pytest.raises(ValueError, match="nothing drafts"):
        Draft()
    with pytest.raises(TypeError, match="expected a tuple of passes"):
        Draft(("w4a8",))
    with pytest.raises(CompileError, match="drafts already"):
        Pipeline((Draft(ngram=True), Draft(ngram=True))).run(program)
    with pytest.raises(Unsupported, match="needs an entry 'decode'"):
        Pipeline((Draft(ngram=True),)).run(zoo.traced("bert").clone())
    with pytest.raises(InputError, match="draft is 'w4a8'"):
        compiled().generate(prompts(1), 3, draft="w4a8")


def test_a_target_that_rounds_otherwise_generates_plainly():
    program = zoo.traced("llama-gqa").clone()
    model = sv.compile(program, draft="ngram", target="reference")
    wanted = compiled().generate(prompts(1), 10, draft=False, stop=())
    assert np.array_equal(model.generate(prompts(1), 10, stop=()), wanted)
    assert not model.drafting.rounds
    assert "drafts nothing" in model.ledger
    with pytest.raises(Unsupported, match="cannot verify drafts"):
        model.generate(prompts(1), 3, draft="ngram")


def test_sparse_kernels_do_not_verify():
    program = zoo.traced("llama-gqa").clone()
    program.calibration = Calibration(({"input_ids": torch.tensor(prompts(1, 20))},))
    with pytest.raises(Unsupported, match="which weights a sparse kernel reads"):
        Pipeline((sv.passes.SparsifyActivations(0.5), Draft(ngram=True))).run(program)


def test_the_longest_context_drafts():
    table = NGrams()
    table.read([1, 2, 3, 4, 9, 2, 3, 5])
    assert table.next([7, 2, 3]) == (5, 2)
    assert table.next([1, 2, 3]) == (4, 3)
    assert table.next([8]) is None
    table.guess(8, 6)
    assert table.next([0, 8]) == (6, 1)


def test_old_contexts_go():
    table = NGrams(most=10)
    for token in range(100):
        table.guess(token, token + 1)
    assert table.next([99]) == (100, 1)
    assert table.next([50]) is None


def test_rates_follow_what_happens():
    rate = Rate()
    for _ in range(200):
        rate.add(False)
    assert float(rate) < 0.1
    for _ in range(200):
        rate.add(True)
    assert float(rate) > 0.9


def test_time_of_a_call_is_learnt():
    reading = Reading()
    for _ in range(50):
        reading.add(1, 1e-3)
        reading.add(5, 1.2e-3)
    reading.add(1, 1.0)
    assert reading(1) == pytest.approx(1e-3, rel=0.1)
    assert reading(9) == pytest.approx(1.4e-3, rel=0.2)


def simulated(chance: float, draft: float, tokens: int = 3000) -> float:
    """Time beside plain decoding, where a token read beside others takes 0.1 of a call, a draft `draft`."""
    policy, random, spent, made = Policy(), np.random.default_rng(0), 0.0, 0
    while made < tokens:
        count, expected, reach = 0, 0.0, 1.0
        while policy.allowed() and count < QUERIES - 1 and policy.pays(count, expected, reach * policy.rate("first")):
            reach *= policy.rate("first")
            expected += reach
            count += 1
            policy.drafting.add(draft)
        accepted = 0
        while accepted < count and random.random() < chance:
            accepted += 1
        for number in range(min(count, accepted + 1)):
            policy.rates["first"].add(number < accepted)
        seconds = 1 + 0.1 * count
        policy.settle(count + 1, accepted + 1, seconds, count * draft)
        spent += seconds + count * draft
        made += accepted + 1
    return spent / made


def test_drafting_that_does_not_pay_stops():
    assert simulated(0.0, 0.5) < 1 + 2 * ALLOWED
    assert simulated(0.2, 1.0) < 1 + 2 * ALLOWED
    assert simulated(0.3, 0.2) < 1 + 2 * ALLOWED


def test_drafting_that_pays_goes_on():
    assert simulated(0.9, 0.2) < 0.6
    assert simulated(0.95, 0.0) < 0.3
    assert simulated(0.6, 0.1) < 0.85


def test_ngrams_learn_kept_text_only():
    class Held:
        tokens = np.array([[5, 6, 7, 8]])

    drafter = NGramDrafter(NGrams(), Policy())
    drafter.learn(Held, 1, 2, np.eye(9)[[[6, 7, 1]]])
    assert drafter.table.next([5, 6]) == (7, 2)
    assert drafter.table.next([6, 7]) == (7, 1)
    assert Sampling().temperature == 0


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("mistral", ""), pytest.param("gpt2", "", marks=pytest.mark.nightly),
        pytest.param("llama-gqa", "quantize-cache(bits=8)", marks=pytest.mark.nightly),
        ("llama-gqa", "quantize-cache(bits=4)"),
    ],
)  # fmt: skip
def test_logits_of_a_tree_are_those_of_each_of_its_chains(name, passes):
    model = compiled(name, "tree", passes)
    prompt, tree = prompts(1), np.random.default_rng(1).integers(3, zoo.VOCAB, (1, 7))
    depths = (0, 1, 2, 3, 2, 1, 2)

    def after(tokens: np.ndarray, depths: tuple[int, ...] | None = None) -> np.ndarray:
        session = Session.begin(model._runner, prompt)
        session.feed(prompt)
        return session.score(tokens) if depths is None else session.branch("tree", tokens, depths)

    together = after(tree, depths)
    for token in range(len(depths)):
        path = path_to(depths, token)
        assert np.array_equal(together[:, token], after(tree[:, path])[:, -1]), token


def test_a_path_through_a_tree_stays_in_the_caches():
    model = compiled(draft="tree")
    prompt, tree = prompts(1), np.random.default_rng(2).integers(3, zoo.VOCAB, (1, 5))
    branched, plain = (Session.begin(model._runner, prompt) for _ in range(2))
    for session in (branched, plain):
        session.feed(prompt)
    branched.branch("tree", tree, (0, 1, 2, 1, 2))
    branched.keep(prompt.shape[1], [0, 3, 4])
    branched.rewind(prompt.shape[1] + 3)
    plain.score(tree[:, [0, 3, 4]])
    assert np.array_equal(branched.tokens, plain.tokens)
    end = prompt.shape[1] + 3
    for name, array in plain.state.arrays.items():
        assert np.array_equal(branched.state.arrays[name][:, :, :end], array[:, :, :end]), name


def test_drafts_of_a_single_row_are_trees():
    model, seen, branch = eager(compiled(draft="tree")), [], Session.branch

    def counted(session: Session, entry: str, tokens: np.ndarray, depths: list[int]) -> np.ndarray:
        seen.append(depths)
        return branch(session, entry, tokens, depths)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "branch", counted)
        for batch in (1, 2):
            before = len(seen)
            model.generate(prompts(batch), max_new_tokens=40)
            assert (len(seen) > before) == (batch == 1)
    assert any(depths.count(1) > 1 for depths in seen)


def test_the_likeliest_of_a_tree_comes_first():
    draft, policy = Proposal(), Eager()
    first = draft.add(policy, np.array([5]), 1)
    beside = draft.add(policy, np.array([6]), (1, 1), 0)
    draft.add(policy, np.array([7]), 1, first)
    draft.add(policy, np.array([8]), 1, beside)
    assert draft.parents == [0, 0, 1, 2]
    assert draft.preorder() == ([0, 1, 3, 2, 4], [0, 1, 2, 1, 2])
    assert draft.reach[1] > draft.reach[2] > draft.reach[4]


def test_several_tokens_that_followed_are_known():
    table = NGrams()
    for token in (7, 8, 9, 7, 6):
        table.guess(5, token)
    table.read([1, 5, 4])
    assert table.options([1, 5]) == [(4, 2, 0), (6, 1, 0), (7, 1, 1)]
    assert table.options([5]) == [(6, 1, 0), (7, 1, 1), (9, 1, 2)]
    assert table.options([2]) == []


def test_ranked_tokens_begin_with_the_pick():
    logits = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    before, uniform = np.array([[1, 2]]), np.array([0.3])
    for sampling in (Sampling(), Sampling(0.8), Sampling(1.0, top_k=2), Sampling(0.9, repetition_penalty=1.3)):
        ranked = sampling.ranked(logits, before, uniform, 3)
        assert ranked[0, 0] == sampling.pick(logits, before, uniform)[0]
        assert len(set(ranked[0])) == ranked.shape[1] == (2 if sampling.top_k else 3)
    assert Sampling().ranked(logits, before, uniform, 3)[0].tolist() == (-logits[0]).argsort()[:3].tolist()


def test_a_tree_needs_positions_that_follow_its_depths():
    program = zoo.traced("llama-gqa").clone()
    entry = program.entries["decode"]
    count = entry.calls(torch.ops.aten.arange.default)[0]
    double = entry.emit(torch.ops.aten.mul.Tensor, count, 1, before=next(iter(count.users)), made_by="test")
    next(iter(count.users)).replace_input_with(count, double)
    changed, ledger = Pipeline([Draft(ngram=True, tree=True)], check=False).run(program)
    assert "tree" not in changed.entries
    assert changed.info["draft"]["tree"] == ""
    assert "tokens are counted otherwise" in ledger.rows[0].changes.refused[0].reason
