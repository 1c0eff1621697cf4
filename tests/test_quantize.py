"""Passes that round, and the recipes: integers against numpy, sharing, refusals, what the ledger says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.causal_lm import chunked_error
from sylvester.compiler.driver import resolve_passes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ledger import Ledger
from sylvester.compiler.ops import attention
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program, binding
from sylvester.compiler.quantization import round_int4, round_int8
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.quantize_cache import QuantizeCache
from tests import zoo
from tests.programs import ops, program, reasons

NEXT = {
    "bf16": (dialect.linear_bf16, dialect.widen_bf16),
    "int8": (dialect.linear_w8a8, dialect.dequantize_w8),
    "int4": (dialect.linear_w4a8, dialect.dequantize_w4),
}


def run(made: Program, *steps: sv.passes.Quantize) -> tuple[Program, Ledger]:
    return Pipeline(steps).run(made)


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def one_layer(k: int = 64, n: int = 5) -> Program:
    weights = {"weight": torch.randn(n, k), "bias": torch.randn(n)}
    return program(layer, torch.randn(2, 3, k), weights=weights)


def tied(ids: Tensor, table: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.embedding(ids, table)), table)


def tied_program() -> Program:
    return program(tied, torch.randint(11, (2, 5)), weights={"table": torch.randn(11, 64)}, axes=lambda _: (0, 1))


@pytest.mark.parametrize("group", [0, 32, 64])
def test_int8_numbers(group: int) -> None:
    weight = torch.randn(9, 192) * torch.logspace(-3, 3, 9)[:, None]

    numbers, scales = round_int8(weight, group)

    split = weight.numpy().reshape(9, -1, group or 192)
    expected = np.abs(split).max(-1) / np.float32(127)
    if group:
        expected = torch.from_numpy(expected).bfloat16().float().numpy()
    assert np.array_equal(scales.numpy(), expected)
    rounded = np.clip(np.rint(split / expected[..., None]), -127, 127)
    assert np.array_equal(numbers.numpy(), rounded.reshape(9, 192))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_numbers(group: int) -> None:
    weight = torch.randn(9, 384) * torch.logspace(-3, 3, 9)[:, None]

    packed, scales = round_int4(weight, group)

    split = weight.numpy().reshape(9, -1, group)
    extreme = np.take_along_axis(split, np.abs(split).argmax(-1)[..., None], -1)[..., 0]
    expected = torch.from_numpy(extreme / np.float32(-8)).bfloat16().float().numpy()
    assert np.array_equal(scales.numpy(), expected)
    rounded = np.clip(np.rint(split / expected[..., None]), -8, 7).reshape(9, 384)
    found = np.stack((packed.numpy() & 15, packed.numpy() >> 4), -1).reshape(9, 384).astype(int) - 8
    assert np.array_equal(found, rounded)
    assert all((g == -8).any() for g in found.reshape(-1, group))


def test_rows_of_zeros_and_slices_of_tall_weights() -> None:
    weight = torch.randn(dialect.ROWS_AT_ONCE + 3, 32)
    weight[-1] = 0

    for rounded, widen in ((round_int8, dialect.dequantize_w8), (round_int4, dialect.dequantize_w4)):
        numbers, scales = rounded(weight)
        tail = rounded(weight[-3:])
        assert numbers[-3:].equal(tail[0])
        assert scales[-3:].equal(tail[1])
        found = widen(numbers, scales)
        assert found[-1].equal(torch.zeros(32))
        assert float((found - weight).abs().max()) < float(weight.abs().max()) / 8


@pytest.mark.parametrize("group", [0, 16, 48])
def test_int4_groups_of_other_sizes(group: int) -> None:
    with pytest.raises(ValueError, match=rf"int4 has groups of \(32, 64, 128\), found {group}"):
        round_int4(torch.zeros(2, 96), group)


@pytest.mark.parametrize("weights", NEXT)
def test_a_layer_reads_rounded_weights(weights: str) -> None:
    made = one_layer()

    after, _ = run(made, Quantize(weights=weights))

    assert ops(after) == [str(NEXT[weights][0].target).removesuffix(".default")]
    stored = {
        "bf16": ["weight.bf16"],
        "int8": ["weight.int8", "weight.scales"],
        "int4": ["weight.int4", "weight.scales"],
    }
    assert sorted(after.weights) == ["bias", *stored[weights]]
    x = made.main.examples["x0"]
    wide = NEXT[weights][1](*(after.weights[key] for key in stored[weights]))
    expected = F.linear(x, wide, made.weights["bias"])
    found = after.run("forward", {"x0": x})["y0"]
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert ops(made) == ["aten.linear"]


def test_bytes_in_the_ledger() -> None:
    n, k = 40, 128
    facts = {
        Quantize("bf16"): n * k * 2,
        Quantize("int8"): n * k + n * 4,
        Quantize("int8", group=64): n * k + n * k // 64 * 4,
        Quantize("int4"): n * k // 2 + n * k // 32 * 4,
        Quantize("int4", group=128): n * k // 2 + n * k // 128 * 4,
    }
    for step, expected in facts.items():
        row = run(one_layer(k, n), step)[1].rows[0]
        assert row.after.parameter_bytes == expected + n * 4, step
        assert row.before.parameter_bytes == n * k * 4 + n * 4


@pytest.mark.parametrize("weights", NEXT)
def test_a_tied_embedding_reads_the_same_numbers(weights: str) -> None:
    made = tied_program()

    after, ledger = run(made, Quantize(weights=weights))

    linear, widen = (str(op.target).removesuffix(".default") for op in NEXT[weights])
    assert ops(after) == [widen, "aten.embedding", "aten.tanh", linear]
    assert "table" not in after.weights
    assert ledger.rows[0].changes.counts() == {"linear and embedding": 1}
    ids = torch.arange(11)[None]
    table = NEXT[weights][1](*(after.weights[k] for k in after.weights))
    assert after.run("forward", {"x0": ids})["y0"].shape == (1, 11, 11)
    widened = after.main.calls(NEXT[weights][1].target)[0]
    assert [binding(n).key for n in widened.args] == list(after.weights)
    assert float((table - made.weights["table"]).abs().max()) < 0.3


def test_an_embedding_alone_stays_unless_asked_for() -> None:
    def function(ids: Tensor, table: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, table), weight)

    made = program(
        function,
        torch.randint(11, (2, 5)),
        weights={"table": torch.randn(11, 64), "weight": torch.randn(3, 64)},
        axes=lambda _: (0, 1),
    )

    after, ledger = run(made, Quantize())
    assert list(after.weights) == ["table", "weight.int8", "weight.scales"]
    assert reasons(ledger) == ["an embedding alone is left in float; `embeddings=True` rounds it"]

    after, ledger = run(made, Quantize(embeddings=True))
    assert sorted(after.weights) == ["table.int8", "table.scales", "weight.int8", "weight.scales"]
    assert ledger.rows[0].changes.counts() == {"linear": 1, "embedding": 1}


def test_what_is_skipped_or_does_not_fit_is_left_with_a_reason() -> None:
    cases = [
        (one_layer(64), Quantize(skip=("we*",)), "`skip` names it"),
        (one_layer(16), Quantize(), "the depth is 16, expected at least 32"),
        (one_layer(48), Quantize("int4"), "groups of 32 do not divide the depth of 48"),
        (one_layer(192), Quantize("int8", group=128), "groups of 128 do not divide the depth of 192"),
    ]
    for made, step, reason in cases:
        after, ledger = run(made, step)
        assert ops(after) == ["aten.linear"]
        assert reasons(ledger) == [reason]


def test_a_weight_of_another_type_is_left() -> None:
    made = program(
        layer, torch.randn(3, 64).double(), weights={"w": torch.randn(5, 64).double(), "b": torch.ones(5).double()}
    )

    assert reasons(run(made, Quantize())[1]) == ["the weight is torch.float64[5, 64], expected a float32 matrix"]


def test_a_computed_weight_is_left() -> None:
    made = program(lambda x, w: F.linear(x, w * 2), torch.randn(3, 64), weights={"weight": torch.randn(5, 64)})

    assert reasons(run(made, Quantize())[1]) == ["the weight %mul is computed, expected a stored one"]


@pytest.mark.parametrize(
    "function", [lambda x, w: F.linear(x, w) + w.sum(), lambda x, w: F.linear(x, w) + F.linear(w, w)]
)
def test_a_weight_that_others_read_is_left(function: object) -> None:
    made = program(function, torch.randn(64, 64), weights={"weight": torch.randn(64, 64)})

    (found,) = reasons(run(made, Quantize())[1])

    assert found.endswith("reads the weight too")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"weights": "int3"}, ValueError, "weights is 'int3', expected one of"),
        ({"group": 48}, ValueError, "group is 48 for int8"),
        ({"weights": "bf16", "group": 32}, ValueError, "group is 32 for bf16"),
        ({"skip": "lm_head.*"}, TypeError, "expected a tuple of patterns"),
    ],
)
def test_options_are_checked(options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Quantize(**options)


def test_the_text_of_a_pass_rebuilds_it() -> None:
    step = Quantize("int4", group=64, skip=("a.*", "b"))

    assert str(step) == "quantize(weights='int4', group=64, skip=('a.*', 'b'))"
    assert sv.passes.Quantize is Quantize


@pytest.fixture(scope="module", params=["llama-tied", "gpt2"])
def language_model(request: pytest.FixtureRequest) -> Program:
    case = zoo.case(request.param)
    return sv.trace(case.model, case.inputs)


def test_all_entries_share_one_copy(language_model: Program) -> None:
    after, ledger = run(language_model, Quantize())

    for name in ("prefill", "decode", "start"):
        before = len(language_model.entries[name].calls(torch.ops.aten.linear.default))
        entry = after.entries[name]
        assert not entry.calls(torch.ops.aten.linear.default)
        assert len(entry.calls(dialect.linear_w8a8.target)) == before
        assert len(entry.calls(dialect.dequantize_w8.target)) == 1
    kept = sum(t.numel() for k, t in after.weights.items() if t.dtype == torch.int8)
    assert kept == sum(
        language_model.weights[k.removesuffix(".int8")].numel() for k in after.weights if k.endswith("int8")
    )
    assert ledger.rows[0].after.parameter_bytes < 0.4 * ledger.rows[0].before.parameter_bytes


def test_the_ledger_says_what_changed_on_the_examples(language_model: Program) -> None:
    errors = {}
    for recipe in ("bf16", "w8a8"):
        row = run(language_model, *resolve_passes(recipe))[1].rows[0]
        prefill, decode = row.measured
        assert (prefill.entry, prefill.output, decode.entry, decode.made_up) == ("prefill", "logits", "decode", True)
        assert row.error == max(prefill.largest, decode.largest)
        assert prefill.next_token is not None
        assert prefill.next_token.agreement > 0.8
        assert 0 <= prefill.next_token.kl < 0.05
        assert prefill.next_token.positions == 2 * 11
        errors[recipe] = prefill.error
        assert "top-1 agreement" in str(Ledger([row]))
        assert Ledger([row]).to_dict()[0]["measured"][0]["next_token"]["positions"] == 22
    assert 0 < errors["bf16"] < errors["w8a8"] < 0.2


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
@pytest.mark.parametrize("recipe", ["bf16", "w8a8"])
def test_reference_backend(name: str, recipe: str) -> None:
    case = zoo.case(name)
    exact = zoo.tensors(case.model(**case.inputs))[0].detach()

    with sv.compile(case.model, case.inputs, target="reference", passes=recipe) as compiled:
        found = compiled(**case.inputs)[0]

    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1
    assert compiled.manifest.passes == tuple(str(step) for step in resolve_passes(recipe))


def test_reference_backend_generates() -> None:
    case = zoo.case("llama-tied")
    ids = case.inputs["input_ids"]

    with sv.compile(case.model, case.inputs, target=sv.Target("reference", max_length=32), passes="w8a8") as compiled:
        found = compiled.generate(ids, max_new_tokens=3, stop=())
        assert {slot.dtype for slot in compiled.manifest.state.values()} == {"bfloat16"}
        expected = ids
        for _ in range(3):
            expected = torch.cat([expected, compiled(expected).logits[:, -1:].argmax(-1)], 1)

    assert found.tolist() == expected.tolist()


def test_recipes_are_lists_of_passes() -> None:
    assert resolve_passes("w4a8") == (Quantize("int4"), QuantizeCache(), QuantizeAttention())
    assert resolve_passes(["canonicalize", "bf16"])[1:] == (Quantize("bf16"), QuantizeCache(), QuantizeAttention())
    with pytest.raises(CompileError, match=r"no pass named 'w4a9'\n.*did you mean 'w4a8'"):
        resolve_passes("w4a9")


def test_caches_hold_bfloat16(language_model: Program) -> None:
    after, ledger = run(language_model, QuantizeCache())

    assert {slot.dtype for slot in after.state.values()} == {torch.bfloat16}
    assert ledger.rows[0].changes.counts() == {"cache": len(after.state)}
    assert {slot.dtype for slot in language_model.state.values()} == {torch.float32}
    prefill, decode = ledger.rows[0].measured
    assert prefill.error == 0.0
    assert 0 < decode.error < 1e-2
    tokens = language_model.main.examples["input_ids"]
    assert 0 < chunked_error(after, tokens, (4, 1, tokens.shape[1] - 5)) < 2e-2


def test_a_program_without_caches_keeps_none() -> None:
    after, ledger = Pipeline((QuantizeCache(),)).run(one_layer())

    assert not after.state
    assert reasons(ledger) == ["the program has no caches"]


@pytest.mark.parametrize("before", [True, False], ids=["caches first", "attention first"])
def test_attention_multiplies_bfloat16(language_model: Program, before: bool) -> None:
    steps = [QuantizeCache(), QuantizeAttention()]
    after, ledger = run(language_model, *(steps if before else reversed(steps)))

    for entry, old in zip(after.entries.values(), language_model.entries.values(), strict=True):
        assert not entry.calls(attention.target)
        assert len(entry.calls(dialect.attention_bf16.target)) == len(old.calls(attention.target)) > 0
    cache, product = ledger.rows if before else reversed(ledger.rows)
    assert cache.changes.counts() == {"cache": len(after.state)}
    assert 0 < product.measured[0].error < 1e-2


def test_wider_attention_is_left() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8, dtype=torch.float64) for _ in range(3))
    made = program(lambda *x: attention(*x, None, None, 0.5, True, 0), q, k, v)

    after, ledger = run(made, QuantizeAttention())

    assert "sylvester.attention" in ops(after)
    assert reasons(ledger) == ["it computes in torch.float64, expected torch.float32"]
