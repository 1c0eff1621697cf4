"""DeriveDecode with biases per position of the key (ALiBi): a weight for the caches, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import sylvester as sv
from sylvester.compiler import key_bias, ops
from sylvester.compiler.causal_lm import analyse, chunked_error
from sylvester.compiler.changes import Refusal
from sylvester.compiler.driver import RAISE, resolve_passes
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import value
from sylvester.compiler.trace import capture
from sylvester.passes.derive_decode import DeriveDecode
from tests import zoo
from tests.nightly import by_night
from tests.test_derive_decode import HEADS, VOCAB, derived, gpt, no_positions

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).reshape(HEADS, 1, 1)
CHUNKS = [(1,) * 12, (5, 1, 1, 5)]


def by_key(n):
    return SLOPES * torch.arange(n)


def by_distance(n):
    i = torch.arange(n)
    return SLOPES * (i[None] - i[:, None])


def from_the_end(n):
    return SLOPES * torch.arange(1 - n, 1)


def by_absolute_distance(n):
    i = torch.arange(n)
    return -SLOPES * (i[None] - i[:, None]).abs()


def curved(n):
    return (SLOPES * torch.arange(n)).sqrt()


def in_bfloat16(n):
    return (SLOPES.bfloat16() * torch.arange(n)).float()


def attend(bias):
    def function(self, q, k, v):
        return ops.attention(q, k, v, bias(q.shape[2]), None, 0.4, True, 0)

    return function


def biased(bias, **methods):
    return gpt(positions=no_positions, attend=attend(bias), **methods)


@pytest.mark.parametrize("chunks", by_night(CHUNKS, CHUNKS[1:]), ids=str)
@pytest.mark.parametrize("bias", [by_key, by_distance, from_the_end, by_absolute_distance, curved, in_bfloat16])
def test_decoding_in_chunks_is_one_forward(bias, chunks):
    before = biased(bias)
    program = derived(before, max_length=24)
    tokens = torch.randint(VOCAB, (3, 12))

    assert chunked_error(program, tokens, chunks) < 1e-5
    state = {key: torch.zeros([3, *slot.shape[1:]]) for key, slot in program.state.items()}
    found = program.run("prefill", {"ids": tokens}, state)["out0"]
    torch.testing.assert_close(found, before.run("forward", {"ids": tokens})["out0"], rtol=1e-5, atol=1e-5)


def test_equal_biases_are_one_weight_and_the_arithmetic_goes():
    program = derived(biased(by_distance), max_length=24)

    assert key_bias.stored(program) == ["key_bias"]
    assert program.weights["key_bias"].shape == (1, HEADS, 1, 24)
    masks = [node.args[3] for node in program.entries["decode"].calls(ops.attention.target)]
    assert [node.op for node in masks] == ["placeholder"] * 2
    for name in ("prefill", "decode"):
        assert not program.entries[name].calls(torch.ops.aten.sub.Tensor)
    length = value(program.entries["prefill"].results()[0]).shape[1]
    cuts = [node.args[3] for node in program.entries["prefill"].calls(ops.attention.target)]
    assert [str(value(cut).shape) for cut in cuts] == [str(torch.Size([1, HEADS, 1, length]))] * 2


def test_a_bias_beside_position_embeddings():
    program = derived(gpt(attend=attend(by_key)))

    assert program.info["max_length"] == 32
    assert chunked_error(program, torch.randint(VOCAB, (3, 12)), (5, 1, 6)) < 1e-5


def test_a_long_bias_over_queries_continues_its_line(monkeypatch):
    monkeypatch.setattr(key_bias, "MOST", 70 * 70 * HEADS)
    program = derived(biased(by_distance), max_length=300)

    torch.testing.assert_close(program.weights["key_bias"][0], by_key(300))


def test_a_long_bias_that_is_no_line_is_refused(monkeypatch):
    monkeypatch.setattr(key_bias, "MOST", 70 * 70 * HEADS)

    with pytest.raises(Unsupported, match="it does not grow evenly over 70 keys, and 300 are too many to evaluate"):
        derived(biased(lambda n: curved(n) + torch.zeros(n, 1)), max_length=300)


def near_and_far(n):
    i = torch.arange(n)
    return SLOPES * (i[:, None] - i[None]).clamp(0, 5)


def shrinking(n):
    return SLOPES * torch.arange(n) / n


def of_positions(n):
    i = torch.arange(n)
    return (i[None] - i[:, None]) % 2 == 0


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        (near_and_far, "it depends on more than the position of the key"),
        (shrinking, "it depends on more than the position of the key"),
        (of_positions, "it is torch.bool of 2 axes, expected floats"),
    ],
)
def test_other_masks_are_refused(bias, reason):
    found = analyse(biased(bias))

    assert isinstance(found, Refusal)
    assert found.reason.startswith(f"an attention has a mask that is no bias per key: {reason}")
    assert found.at is not None


def test_a_table_bounds_the_length():
    table = nn.Parameter(SLOPES * torch.arange(-19, 1))

    def function(self, q, k, v):
        return ops.attention(q, k, v, self.bias[:, :, 20 - q.shape[2] :], None, 0.4, True, 0)

    program = gpt(positions=no_positions, attend=function, bias=table)

    assert derived(program).info["max_length"] == 20
    with pytest.raises(Unsupported, match="max_length is 21, the position table holds 20"):
        derived(program, max_length=21)


SMALL = {"vocab_size": zoo.VOCAB, "use_cache": False}
LLAMA = {**SMALL, **zoo.GQA, "num_hidden_layers": 2, "pad_token_id": None}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": False}
MODELS = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(**SMALL, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, **FALCON, alibi=True, multi_query=False)),
    "falcon-rotary": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, **FALCON, alibi=False)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**LLAMA, head_dim=16, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
    ),
    "gpt-neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            **SMALL, **zoo.ENDS, num_layers=2, hidden_size=32, num_heads=4, window_size=4, max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
        )
    ),
}  # fmt: skip
FLAGS = {
    "bloom": {(True, True, 0)}, "mpt": {(True, True, 0)}, "falcon": {(True, True, 0)},
    "falcon-rotary": {(False, True, 0)}, "gemma2": {(False, True, 0, 2.0), (False, True, 4, 2.0)},
    "gpt-neo": {(False, True, 0), (False, True, 4)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "form"), [*((n, "eager") for n in MODELS), ("falcon", "sdpa")])
def test_hugging_face(name, form):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    zoo.randomise(model)
    model.set_attn_implementation(form)
    raised = Pipeline(resolve_passes(RAISE))(capture(model, zoo.token_ids(2, 11)))
    attentions = raised.main.calls(ops.attention.target)

    program = Pipeline((DeriveDecode(max_length=32),))(raised)

    assert len(attentions) == 2
    assert {(node.args[3] is not None, *node.args[6:]) for node in attentions} == FLAGS[name]
    tokens = zoo.tokens(3, 23)
    with torch.no_grad():
        exact = model(tokens).logits
    state = {key: torch.zeros([3, *slot.shape[1:]]) for key, slot in program.state.items()}
    found = program.run("prefill", {"input_ids": tokens}, state)["logits"]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert chunked_error(program, tokens, (5, 1, 1, 7, 1, 8)) < 1e-5


def test_greedy_generation_on_the_cpu():
    torch.manual_seed(0)
    model = MODELS["bloom"]().eval()
    zoo.randomise(model)
    tokens = zoo.tokens(1, 9)
    compiled = sv.compile(model, {"input_ids": tokens}, target=sv.Target("cpu", max_length=32))

    found = torch.as_tensor(compiled.generate(tokens, max_new_tokens=8)).reshape(-1)[-8:]

    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
    assert found.tolist() == tokens[0, -8:].tolist()
