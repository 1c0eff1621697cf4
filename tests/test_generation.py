"""Generation on compiled models of the zoo: the tokens of Hugging Face, prompts in parts, caches used again."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import sylvester as sv
from sylvester.compiler.errors import InputError
from sylvester.compiler.session import Session
from sylvester.passes import QuantizeCache, SkipLayers
from tests import zoo

MODELS = ("llama-gqa", "gpt-neox", "mistral")
TOKENS = 64


@pytest.fixture(scope="module")
def compiled():
    """Name -> the compiled model, made when it is first asked for."""
    made = {}
    with ExitStack() as stack:

        def get(name):
            if name not in made:
                target = sv.Target("cpu", isas=("avx2",))
                made[name] = stack.enter_context(sv.compile(zoo.traced(name), target=target, threads=1))
            return made[name]

        yield get


@pytest.fixture
def lm(compiled):
    """No caches are left from the test before."""
    lm = compiled("llama-gqa")
    lm._pool.clear()
    return lm


@pytest.fixture
def read(lm, monkeypatch):
    """(entry, tokens) of every call."""
    calls, run = [], lm._runner.run

    def counted(entry, inputs, state=None):
        calls.append((entry, next(iter(inputs.values())).shape[1]))
        return run(entry, inputs, state)

    monkeypatch.setattr(lm._runner, "run", counted)
    return calls


def prompts(batch, length, seed=0):
    return np.random.default_rng(seed).integers(3, zoo.VOCAB, (batch, length))


def hugging_face(name, ids, **options):
    """Greedy, with an end that no token is: None would be the model's own."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, use_cache=True, pad_token_id=0, eos_token_id=zoo.VOCAB, **options
    )
    mask = torch.ones(ids.shape, dtype=torch.int64)
    return zoo.case(name).model.generate(torch.tensor(ids), attention_mask=mask, generation_config=config).tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_hugging_face(compiled, name, batch, penalty):
    ids = prompts(batch, 9)

    found = compiled(name).generate(ids, TOKENS, stop=(), repetition_penalty=penalty)

    assert found.tolist() == hugging_face(name, ids, repetition_penalty=penalty)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 3}])
def test_streams_give_the_same_tokens(lm, batch, options):
    ids = prompts(batch, 7)

    whole = lm.generate(ids, 20, stop=(), **options)[:, 7:]
    stream = list(lm.generate(ids, 20, stop=(), stream=True, **options))

    assert np.array_equal(np.reshape(stream, (20, batch)).T, whole)
    assert all(isinstance(step, int) if batch == 1 else step.shape == (batch,) for step in stream)


def test_seeds_repeat_and_rows_draw_for_themselves(lm):
    ids = np.repeat(prompts(1, 5), 4, 0)

    def draw(rows, seed=1):
        return lm.generate(ids[:rows], 20, temperature=2.0, seed=seed, stop=()).tolist()

    four = draw(4)
    assert four == draw(4)
    assert four != draw(4, seed=2)
    assert four[:2] == draw(2)
    assert len({tuple(row) for row in four}) == 4


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
def test_prompts_of_different_lengths_give_what_each_gives_alone(lm, options):
    lengths = (5, 9, 5, 12)
    rows = [prompts(1, n, seed)[0] for seed, n in enumerate(lengths)]

    together = lm.generate(rows, 20, **options)
    alone = [lm.generate([*rows[:n], row], 20, **options)[-1] for n, row in enumerate(rows)]

    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    assert lm.generate([row.tolist() for row in rows], 20, **options) == [row.tolist() for row in together]
    assert all(torch.is_tensor(row) for row in lm.generate([torch.tensor(row) for row in rows], 2))
    if not options:
        assert together[1].tolist() == lm.generate(rows[1][None], 20)[0].tolist()


def test_rows_of_equal_length_run_together(lm, read):
    lm.generate([prompts(1, n)[0] for n in (5, 9, 5, 9, 5)], 4, stop=())

    assert read == [("start", 5), *[("decode", 1)] * 3, ("start", 9), *[("decode", 1)] * 3]


@pytest.mark.parametrize("chunk", [1, 5, 16, 40, 64])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_read_in_parts_is_the_whole_prompt(compiled, name, chunk):
    ids = prompts(2, 40)

    whole, parts = (compiled(name).generate(ids, 30, stop=(), chunk=c, reuse=False) for c in (0, chunk))

    assert parts.tolist() == whole.tolist()


def test_a_long_prompt_is_read_in_chunks(lm, read):
    lm.generate(prompts(2, 40), 3, stop=(), chunk=16)

    assert read == [("start", 16), ("decode", 16), ("decode", 8), ("decode", 1), ("decode", 1)]


def test_a_conversation_goes_on_from_its_caches(lm, read):
    first = lm.generate(prompts(1, 20), 10, stop=())
    longer = np.concatenate([first, prompts(1, 6, seed=1)], 1)
    read.clear()

    found = lm.generate(longer, 10, stop=())

    assert read == [("decode", 7), *[("decode", 1)] * 9]
    assert found.tolist() == lm.generate(longer, 10, stop=(), reuse=False).tolist()


def test_the_common_beginning_is_read_once(lm, read):
    one, two = prompts(1, 30), prompts(1, 30)
    two[:, 24:] = prompts(1, 6, seed=1)
    expected = lm.generate(two, 10, stop=(), reuse=False).tolist()
    lm.generate(one, 3, stop=())
    read.clear()

    assert lm.generate(two, 10, stop=()).tolist() == expected
    assert read[0] == ("decode", 6)
    assert lm.generate(two, 10, stop=()).tolist() == expected
    assert read[10] == ("decode", 1)


@pytest.mark.parametrize("other", [prompts(2, 30), prompts(1, 30, seed=2)])
def test_another_batch_or_another_beginning_is_read_anew(lm, read, other):
    lm.generate(prompts(1, 30), 3, stop=())
    read.clear()

    lm.generate(other, 2, stop=())

    assert read == [("start", 30), ("decode", 1)]


def test_reuse_can_be_switched_off(lm, read):
    ids = prompts(1, 30)
    lm.generate(ids, 3, stop=(), reuse=False)
    lm.generate(ids, 3, stop=())
    lm.generate(ids, 3, stop=(), reuse=False)

    assert [call for call in read if call != ("decode", 1)] == [("start", 30)] * 3


def test_two_streams_never_share_caches(lm):
    ids = prompts(1, 12)
    expected = lm.generate(ids, 20, stop=(), reuse=False)[0, 12:].tolist()
    lm.generate(ids, 2, stop=())

    one, two = (lm.generate(ids, 20, stop=(), stream=True) for _ in range(2))
    steps = list(zip(one, two, strict=True))

    assert [list(row) for row in zip(*steps, strict=True)] == [expected, expected]


def test_an_abandoned_stream_leaves_its_caches(lm, read):
    ids = prompts(1, 12)
    stream = lm.generate(ids, 20, stop=(), stream=True)
    tokens = [next(stream), next(stream)]
    stream.close()
    read.clear()

    found = lm.generate(ids, 2, stop=())

    assert found[0, 12:].tolist() == tokens
    assert read == [("decode", 1)] * 2


def test_threads_generate_side_by_side(lm):
    ids = [prompts(1, 10 + n % 2, seed=n % 3) for n in range(6)]
    expected = [lm.generate(row, 12, stop=(), reuse=False).tolist() for row in ids]
    found = [None] * 6

    def work(n):
        found[n] = lm.generate(ids[n], 12, stop=()).tolist()

    threads = [Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == expected


def test_a_session_scores_what_it_feeds(lm):
    ids = prompts(2, 12)
    session, other = (Session.begin(lm._runner, ids) for _ in range(2))

    session.feed(ids[:, :8])
    scored = session.score(ids[:, 8:])
    other.feed(ids[:, :8])
    fed = np.stack([other.feed(ids[:, n : n + 1]) for n in range(8, 12)], 1)

    assert session.position == 12
    assert np.array_equal(session.tokens, ids)
    np.testing.assert_allclose(scored, fed, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scored[:, -1], Session.begin(lm._runner, ids).score(ids)[:, -1], rtol=1e-4, atol=1e-5)


def test_what_is_forgotten_is_never_read(lm):
    ids = prompts(1, 12)
    session, fresh = (Session.begin(lm._runner, ids) for _ in range(2))
    session.feed(ids)
    session.rewind(5)
    fresh.feed(ids[:, :5])
    for array in session.state.arrays.values():
        array[:, :, 5:] = np.nan

    for _ in range(2):
        tokens = prompts(1, 3, seed=4)
        assert np.array_equal(session.feed(tokens), fresh.feed(tokens))
    assert np.array_equal(session.tokens, fresh.tokens)


@pytest.mark.parametrize("position", [-1, 6])
def test_a_session_goes_back_only(lm, position):
    session = Session.begin(lm._runner, prompts(1, 5))
    session.feed(prompts(1, 5))

    with pytest.raises(InputError, match=f"cannot go to position {position}, the caches hold positions 0 to 5"):
        session.rewind(position)


def test_a_session_refuses_what_does_not_fit(lm):
    session = Session.begin(lm._runner, prompts(1, 5))

    with pytest.raises(InputError, match=r"tokens have shape \[2, 3\], expected \[1, 1 or more\]"):
        session.feed(prompts(2, 3))
    session.feed(prompts(1, 126))
    with pytest.raises(InputError, match="3 tokens after 126 do not fit the caches of 128 positions"):
        session.score(prompts(1, 3))


@pytest.mark.parametrize("made", [SkipLayers(layers=(1,)), QuantizeCache(bits=8)], ids=str)
def test_decoding_that_differs_from_reading_takes_no_part_of_a_prompt(made):
    ids = prompts(1, 20)
    target = sv.Target("reference", max_length=32)
    with sv.compile(zoo.traced("llama-gqa"), target=target, passes=[made]) as lm:
        lm.generate(ids, 2, stop=())

        assert not lm.manifest.generation.uniform
        assert not lm._pool._kept
        assert lm.generate(ids, 2, stop=(), chunk=8, reuse=True).shape == (1, 22)
        assert lm._pool._kept


def test_draws_follow_the_probabilities(compiled):
    """Chi-square of first tokens against softmax over what top-k, top-p, temperature and penalty leave."""
    lm, rows = compiled("llama-gqa"), 2000
    ids = prompts(1, 6)
    options = {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4}

    drawn = lm.generate(np.repeat(ids, rows, 0), 1, seed=11, stop=(), **options)[:, -1]

    with torch.no_grad():
        expected = warped(zoo.case("llama-gqa").model(torch.tensor(ids)).logits[:, -1], torch.tensor(ids))
    count = Counter(drawn.tolist())
    kept = expected.nonzero()[0].tolist()
    assert set(count) <= set(kept)
    statistic = sum((count[n] - rows * expected[n]) ** 2 / (rows * expected[n]) for n in kept)
    assert statistic < 31  # of 11 degrees of freedom at most: exceeded once in a thousand times


def warped(logits, ids):
    """Probabilities [vocabulary] as Hugging Face makes them."""
    from transformers.generation import logits_process as hf

    made = (
        hf.RepetitionPenaltyLogitsProcessor(1.4),
        hf.TemperatureLogitsWarper(1.3),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.9),
    )
    for process in made:
        logits = process(ids, logits)
    return logits.softmax(-1)[0].numpy()
