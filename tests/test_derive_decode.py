"""DeriveDecode: prefill and decode in any chunks compute what forward did; other models are refused with a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sylvester as sv
from sylvester.compiler import next_token, ops
from sylvester.compiler.causal_lm import analyse, chunked_error
from sylvester.compiler.changes import Refusal
from sylvester.compiler.driver import RAISE, resolve_passes
from sylvester.compiler.errors import CompileError, ContractBroken, Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import binding, value
from sylvester.compiler.trace import capture
from sylvester.compiler.verify import verify
from sylvester.passes import derive_decode
from sylvester.passes.derive_decode import DeriveDecode
from tests import zoo
from tests.nightly import by_night

VOCAB, DIM, HEADS, ROWS = 37, 24, 4, 32
CHUNKS = [(12,), (1,) * 12, (5, 1, 1, 5), (3, 9)]


class Gpt(nn.Module):
    """Two layers of attention and FFN in dialect ops; the variants replace one piece."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.table = nn.Embedding(VOCAB, DIM), nn.Embedding(ROWS, DIM)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 2 * DIM) for _ in range(2))
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def positions(self, ids):
        return self.table(torch.arange(ids.shape[1]))

    def attend(self, q, k, v):
        return ops.attention(q, k, v, None, None, 0.4, True, 0)

    def between(self, x):
        return x

    def forward(self, ids):
        batch, length = ids.shape
        x = self.embed(ids) + self.positions(ids)
        for layer in self.qkv:
            parts = layer(F.layer_norm(x, (DIM,))).reshape(batch, length, 2 * HEADS, DIM // HEADS).permute(0, 2, 1, 3)
            q, k, v = parts.split((HEADS, HEADS // 2, HEADS // 2), 1)
            y = self.attend(q, k, v).permute(0, 2, 1, 3).reshape(batch, length, DIM)
            x = self.between(x + y)
            x = x + self.down(F.gelu(self.up(x)))
        return self.head(x)


def gpt(length=7, **methods):
    """A captured Gpt with some of its methods replaced."""
    model = type("Variant", (Gpt,), methods)().eval()
    return capture(model, (torch.randint(VOCAB, (2, length)),))


def derived(program, **options):
    return Pipeline((DeriveDecode(**options),))(program)


def by_cumulative_sum(self, ids):
    mask = torch.ones(ids.shape[0], ids.shape[1])
    return self.table((torch.cumsum(mask, 1) * mask - 1).long() + 2)


def by_slice(self, ids):
    return self.table.weight[3 : ids.shape[1] + 3]


def by_sine(self, ids):
    angles = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * torch.linspace(0.1, 1, DIM)
    return angles.sin()[None]


def by_expanded(self, ids):
    return self.table(torch.arange(1, ids.shape[1] + 1).unsqueeze(0).expand(ids.shape[0], -1))


def no_positions(self, ids):
    return 0.0


def window(self, q, k, v):
    return ops.attention(q, k, v, None, None, 0.4, True, 4)


@pytest.mark.parametrize("chunks", by_night(CHUNKS, CHUNKS[2:]), ids=str)
@pytest.mark.parametrize(
    "methods",
    [
        {}, {"positions": by_cumulative_sum}, {"positions": by_slice}, {"positions": by_sine},
        {"positions": by_expanded}, {"positions": no_positions}, {"attend": window},
    ],
    ids=["table", "cumsum", "slice", "sine", "expanded", "none", "window"],
)  # fmt: skip
def test_decoding_in_chunks_is_one_forward(methods, chunks):
    program = derived(gpt(**methods), max_length=24)

    assert chunked_error(program, torch.randint(VOCAB, (3, 12)), chunks) < 1e-5


@pytest.mark.parametrize(
    "name", by_night(["llama-gqa", "mistral", "qwen3", "gpt2", "gpt-neox", "opt"], ["mistral", "gpt2", "gpt-neox"])
)
def test_zoo(name):
    case = zoo.case(name)
    program = Pipeline(resolve_passes(RAISE))(capture(case.model, case.inputs))

    program = derived(program)

    tokens = zoo.tokens(3, 23)
    whole = program.run("prefill", {"input_ids": tokens}, empty(program, 3))["logits"]
    torch.testing.assert_close(whole, case.model(tokens).logits.detach(), rtol=1e-4, atol=1e-5)
    assert chunked_error(program, tokens, (5, 1, 1, 7, 1, 8)) < 1e-5


def empty(program, batch):
    return {key: torch.zeros([batch, *slot.shape[1:]]) for key, slot in program.state.items()}


def test_entries_and_state():
    program = derived(gpt(), max_length=24)

    assert list(program.entries) == ["prefill", "decode"]
    assert [binding(n).key for n in program.entries["decode"].placeholders("input")] == ["ids", "past"]
    assert [o.name for o in program.entries["decode"].outputs] == ["out0", "k0", "v0", "k1", "v1"]
    assert [slot.index for slot in program.state.values()] == [0, 1, 2, 3]
    batch = value(program.entries["decode"].placeholders("input")[0]).shape[0]
    assert str(list(program.state["k0"].shape)) == f"[{batch}, 2, 24, 6]"
    assert program.info["max_length"] == 24
    assert program.entries["decode"].examples["ids"].shape == (2, 3)
    assert int(program.entries["decode"].examples["past"]) == 5


def test_prefill_attention_reads_fresh_keys():
    program = derived(gpt(), max_length=24)

    prefill, decode = (program.entries[name].calls(ops.attention.target) for name in ("prefill", "decode"))

    assert all(node.args[4] is None and node.args[1].target is not ops.kv_update.target for node in prefill)
    assert all(node.args[4] is not None and node.args[1].target is ops.kv_update.target for node in decode)


def test_weights_are_shared():
    program = gpt()

    assert derived(program, max_length=24).weights.nbytes == program.weights.nbytes


def test_cumulative_sum_leaves_the_decode_entry():
    program = derived(gpt(positions=by_cumulative_sum), max_length=24)

    assert not program.entries["decode"].calls(torch.ops.aten.cumsum.default)


def test_capacity_comes_from_option_info_or_table():
    program = gpt(positions=by_expanded)
    assert derived(program).info["max_length"] == ROWS - 1

    program.info["max_length"] = 16
    assert derived(program).info["max_length"] == 16
    assert derived(program, max_length=8).info["max_length"] == 8


def test_capacity_beyond_the_table_is_refused():
    with pytest.raises(Unsupported, match="max_length is 40, the position table holds 32"):
        derived(gpt(), max_length=40)


def test_unknown_capacity_is_refused():
    with pytest.raises(Unsupported, match="the longest sequence is unknown"):
        derived(gpt(positions=by_sine))


def test_capacity_below_the_example_is_refused():
    with pytest.raises(Unsupported, match="max_length is 5, the example has 7 tokens"):
        derived(gpt(), max_length=5)


def test_capacity_below_the_usual_decode_example():
    program = derived(gpt(length=2), max_length=2)

    assert program.entries["decode"].examples["ids"].shape == (2, 2)
    assert int(program.entries["decode"].examples["past"]) == 0


def averaged(self, x):
    return x + x.mean(1, keepdim=True)


def running(self, x):
    return x + x.cumsum(1)


def shifted(self, x):
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def reversed_(self, x):
    return x.flip(1)


def scaled_by_length(self, x):
    return x / x.shape[1]


def softmax_over_tokens(self, x):
    return x * x.softmax(1)


def folded(self, x):
    return x.permute(0, 2, 1).reshape(x.shape)


def scores(self, x):
    return x + (x @ x.permute(0, 2, 1)).tril() @ x


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (averaged, "pairs tokens or reduces over them"),
        (running, "an op mixes tokens"),
        (shifted, "tokens"),
        (reversed_, "it is not known whether aten.flip.default mixes tokens"),
        (scaled_by_length, "computes with the number of tokens"),
        (softmax_over_tokens, "an op mixes tokens"),
        (folded, "an op mixes tokens"),
        (scores, "pairs tokens"),
    ],
)
def test_ops_that_mix_tokens_are_refused(between, reason):
    found = analyse(gpt(between=between))

    assert isinstance(found, Refusal)
    assert reason in found.reason
    assert found.at is not None


def reversed_table(self, ids):
    return self.table(ids.shape[1] - 1 - torch.arange(ids.shape[1]))


def strided_table(self, ids):
    return self.table(torch.arange(0, 2 * ids.shape[1], 2))


@pytest.mark.parametrize(
    ("positions", "reason"),
    [(reversed_table, "computes with the number of tokens"), (strided_table, "is no position")],
)
def test_positions_that_depend_on_the_length_are_refused(positions, reason):
    found = analyse(gpt(positions=positions))

    assert isinstance(found, Refusal)
    assert reason in found.reason


def bidirectional(self, q, k, v):
    return ops.attention(q, k, v, None, None, 0.4, False, 0)


def masked(self, q, k, v):
    return ops.attention(q, k, v, (k.sum((1, 3)) > 0)[:, None, None], None, 0.4, True, 0)


def plain(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def cross(self, q, k, v):
    return ops.attention(q, k[:, :, :3], v[:, :, :3], None, None, 0.4, True, 0)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (bidirectional, "an attention is not causal"),
        (masked, "an attention has a mask"),
        (plain, "was not raised"),
        (cross, "expected batch"),
    ],
)
def test_attention_that_is_not_causal_is_refused(attend, reason):
    found = analyse(gpt(attend=attend))

    assert isinstance(found, Refusal)
    assert reason in found.reason


@pytest.mark.parametrize("name", ["bert", "mlp", "torch-decoder", "resnet"])
def test_other_models_are_refused(name):
    case = zoo.case(name)

    with pytest.raises(Unsupported, match="not a causal language model"):
        derived(capture(case.model, case.inputs))


def test_fixed_length_is_refused():
    program = capture(Gpt().eval(), (torch.randint(VOCAB, (2, 7)),), dynamic={"ids": {}})

    with pytest.raises(CompileError, match="the length is fixed at 7"):
        derived(program)


def test_self_check_catches_a_wrong_derivation(monkeypatch):
    monkeypatch.setattr(derive_decode, "_read_by_others", lambda positions: {})

    with pytest.raises(ContractBroken, match="decoding in chunks differs"):
        derived(gpt(), max_length=24)


def test_verifies_and_reports():
    program = gpt()

    changes = DeriveDecode(max_length=24).run(program)

    verify(program)
    assert changes.counts() == {"attention": 2, "position": 1}
    assert math.isclose(chunked_error(program, torch.randint(VOCAB, (2, 6)), (6,)), 0.0)


def clamped(self, ids):
    return self.table(torch.arange(ids.shape[1]).clamp(max=15))


def periodic(self, ids):
    return self.table(torch.arange(ids.shape[1]) % 10)


def second_axis(self, ids):
    return self.table.weight[None][:, torch.arange(ids.shape[1])]


@pytest.mark.parametrize("positions", [clamped, periodic, second_axis])
def test_positions_that_end_or_repeat_after_the_example(positions):
    program = derived(gpt(positions=positions), max_length=24)

    assert chunked_error(program, torch.randint(VOCAB, (2, 24)), (17, 1, 3, 3)) < 1e-5


@pytest.mark.parametrize(
    "positions",
    [
        lambda self, ids: self.table.weight[ids.shape[1] - 1 : ids.shape[1]],
        lambda self, ids: torch.full((1,), ids.shape[1]).float().log(),
    ],
    ids=["row", "fill"],
)
def test_the_number_of_tokens_as_a_value_is_refused(positions):
    found = analyse(gpt(positions=positions))

    assert isinstance(found, Refusal)
    assert found.reason == "an op computes with the number of tokens"


def test_outputs_with_the_tokens_first_or_without_tokens():
    def forward(self, ids):
        logits = Gpt.forward(self, ids)
        return logits, logits.permute(1, 0, 2), self.table.weight * 2

    program = derived(gpt(forward=forward), max_length=24)

    assert chunked_error(program, torch.randint(VOCAB, (3, 12)), (5, 1, 1, 5)) < 1e-5


def test_a_length_beyond_what_the_model_states_is_refused():
    program = gpt()
    program.info["max_length"] = 16

    with pytest.raises(Unsupported, match="max_length is 24, the model takes at most 16 tokens"):
        derived(program, max_length=24)


def test_an_example_of_one_sequence_still_takes_several():
    case = zoo.case("llama-gqa")
    program = sv.trace(case.model, (torch.arange(9)[None],))
    ids = torch.randint(zoo.VOCAB, (3, 7))
    found = next_token.run(program, {"input_ids": ids})["logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, case.model(ids).logits, rtol=1e-4, atol=1e-4)
