"""Passes that round: what replaces what, sharing, refusals, options, what the ledger says."""

from __future__ import annotations

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
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.quantize_cache import QuantizeCache
from tests import zoo
from tests.programs import ops, program, reasons

NEXT = {
    16: (dialect.linear_bf16, dialect.widen_bf16, "bf16"),
    "fp16": (dialect.linear_fp16, dialect.widen_fp16, "fp16"),
    "fp8": (dialect.linear_fp8, dialect.dequantize_fp8, "fp8"),
    8: (dialect.linear_w8, dialect.dequantize_w8, "int8"),
    4: (dialect.linear_w4, dialect.dequantize_w4, "int4"),
    3: (dialect.linear_w3, dialect.dequantize_w3, "int3"),
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


@pytest.mark.parametrize("weights", NEXT)
def test_a_layer_reads_rounded_weights(weights: int | str) -> None:
    made = one_layer()

    after, _ = run(made, Quantize(weights=weights))

    assert ops(after) == [str(NEXT[weights][0].target).removesuffix(".default")]
    stored = [f"weight.{NEXT[weights][2]}", *(["weight.scales"] if weights not in (16, "fp16") else [])]
    assert sorted(after.weights) == ["bias", *stored]
    x = made.main.examples["x0"]
    wide = NEXT[weights][1](*(after.weights[key] for key in stored))
    expected = F.linear(x, wide, made.weights["bias"])
    found = after.run("forward", {"x0": x})["y0"]
    assert float((found - expected).norm() / expected.norm()) < (0.02 if weights != "fp8" else 0.04)
    assert ops(made) == ["aten.linear"]


def test_bytes_in_the_ledger() -> None:
    n, k = 40, 128
    facts = {
        Quantize(16): n * k * 2,
        Quantize("fp16"): n * k * 2,
        Quantize("fp8"): n * k + n * 4,
        Quantize(8): n * k + n * 4,
        Quantize(8, group=64): n * k + n * k // 64 * 4,
        Quantize(4): n * k // 2 + n * k // 32 * 4,
        Quantize(4, group=128): n * k // 2 + n * k // 128 * 4,
        Quantize(3): n * k * 3 // 8 + n * k // 32 * 4,
    }
    for step, expected in facts.items():
        row = run(one_layer(k, n), step)[1].rows[0]
        assert row.after.parameter_bytes == expected + n * 4, step
        assert row.before.parameter_bytes == n * k * 4 + n * 4


@pytest.mark.parametrize("weights", NEXT)
def test_a_tied_embedding_reads_the_same_numbers(weights: int | str) -> None:
    made = tied_program()

    after, ledger = run(made, Quantize(weights=weights))

    linear, widen = (str(op.target).removesuffix(".default") for op in NEXT[weights][:2])
    assert ops(after) == [widen, "aten.embedding", "aten.tanh", linear]
    assert "table" not in after.weights
    assert ledger.rows[0].changes.counts() == {"linear and embedding": 1}
    ids = torch.arange(11)[None]
    table = NEXT[weights][1](*(after.weights[k] for k in after.weights))
    assert after.run("forward", {"x0": ids})["y0"].shape == (1, 11, 11)
    widened = after.main.calls(NEXT[weights][1].target)[0]
    assert [binding(n).key for n in widened.args] == list(after.weights)
    assert float((table - made.weights["table"]).abs().max()) < (0.3 if weights != 3 else 0.6)


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
        (one_layer(64), Quantize(per_layer={"weigh?": "float"}), "`per_layer` leaves it in float"),
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
        ({"weights": 5}, ValueError, r"weights is 5, expected one of \(16, 8, 4, 3, 'fp16', 'fp8'\)"),
        ({"weights": "int8"}, ValueError, "weights is 'int8', expected one of"),
        ({"weights": True}, ValueError, "weights is True, expected one of"),
        ({"activations": 3}, ValueError, r"activations is 3, expected one of \(None, 16, 8, 4\)"),
        ({"kv": 2}, ValueError, "kv is 2, expected one of"),
        ({"group": 48}, ValueError, r"group is 48, expected one of \(0, 32, 64, 128\)"),
        ({"method": "awq"}, ValueError, "method is 'awq', expected one of"),
        ({"weights": 16, "group": 32}, ValueError, "weights of 16 bits are bfloat16: no group"),
        ({"weights": 16, "activations": 4}, ValueError, "weights of 16 bits are bfloat16: .*no activations of 4 bits"),
        ({"weights": "fp16", "static": True}, ValueError, "weights in fp16 are read by rows in fp16: .*no static"),
        ({"weights": "fp8", "group": 32}, ValueError, "weights in fp8 have a scale a row, and so have .* no group"),
        ({"weights": "fp8", "activations": 16}, ValueError, "expected activations=8, .*found activations=16"),
        ({"weights": "fp8", "method": "gptq"}, ValueError, "expected .*method='rtn', found .*method='gptq'"),
        ({"activations": 16, "static": True}, ValueError, "static scales need activations of 8 or 4 bits, found 16"),
        ({"per_layer": {"a": 5}}, ValueError, "per_layer gives 5, expected bits"),
        ({"per_layer": {"a": "w8a3"}}, ValueError, "per_layer gives 'w8a3', expected"),
        ({"per_layer": ["a"]}, TypeError, r"per_layer is \['a'\], expected bits by pattern"),
        ({"per_layer": None}, TypeError, "per_layer is None, expected bits by pattern"),
        ({"per_layer": {1: 8}}, TypeError, "per_layer is {1: 8}, expected bits by pattern"),
        ({"weights": 4.0}, ValueError, "weights is 4.0, expected one of"),
        ({"static": "yes"}, TypeError, "static is 'yes', expected True or False"),
        ({"skip": "lm_head.*"}, TypeError, "expected a tuple of patterns"),
        ({"skip": (1,)}, TypeError, "expected a tuple of patterns"),
    ],
)
def test_options_are_checked(options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Quantize(**options)


def test_the_text_of_a_pass_rebuilds_it() -> None:
    step = Quantize(4, kv=8, group=64, method="gptq", per_layer={"a.*": 8, "b": "float"}, skip=("a.*", "b"))

    text = str(step)
    assert text == (
        "quantize(weights=4, kv=8, group=64, method='gptq', per_layer=(('a.*', 8), ('b', 'float')), skip=('a.*', 'b'))"
    )
    assert eval(text, {"quantize": Quantize}) == step
    assert hash(eval(text, {"quantize": Quantize})) == hash(step)
    assert sv.passes.Quantize is Quantize


def three_layers(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, first)), second)), third)


def three_layer_program(k: int = 64) -> Program:
    weights = {"first": torch.randn(k, k) / 8, "second": torch.randn(k, k) / 8, "third": torch.randn(7, k) / 8}
    return program(three_layers, torch.randn(2, 3, k), weights=weights)


def test_layers_have_their_own_widths() -> None:
    step = Quantize(
        4, None, per_layer={"thi*": 8, "third": 3, "f*": "float", "s*d": "w3a4", "absent*": 8}, skip=("no",)
    )

    after, ledger = run(three_layer_program(), step)

    assert sorted(after.weights) == ["first", "second.int3", "second.scales", "third.int8", "third.scales"]
    (second,), (third,) = (after.main.calls(op.target) for op in (dialect.linear_w3, dialect.linear_w8))
    assert (second.args[4], third.args[4]) == (4, 16)
    assert ledger.rows[0].changes.notes == [
        "per_layer names 'absent*', which no weight of a linear layer or embedding matches",
        "skip names 'no', which no weight of a linear layer or embedding matches",
        "rows of x are integers of 16 bits",
    ]


@pytest.mark.parametrize(
    ("k", "weights", "stored"), [(48, 4, "int4"), (45, 4, "int8"), (40, 3, "int3"), (44, 3, "int4"), (45, 3, "int8")]
)
def test_depths_that_do_not_fill_bytes_get_wider_numbers(k: int, weights: int, stored: str) -> None:
    made = one_layer(k)

    after, ledger = run(made, Quantize(weights))

    assert sorted(after.weights) == ["bias", f"weight.{stored}", "weight.scales"]
    step = 2 if weights == 4 else 8
    wider = f"{stored} instead of int{weights}: the depth of {k} is not a multiple of {step}"
    assert ledger.rows[0].changes.notes == ([] if stored == f"int{weights}" else [wider])
    x = made.main.examples["x0"]
    found, expected = after.run("forward", {"x0": x})["y0"], made.run("forward", {"x0": x})["y0"]
    assert float((found - expected).norm() / expected.norm()) < 0.35


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinities")])
@pytest.mark.parametrize("weights", NEXT)
def test_weights_that_are_not_finite(weights: int | str, value: float, word: str) -> None:
    made = one_layer()
    made.weights["weight"][3, 5] = value

    with pytest.raises(CompileError, match=f"the weight 'weight' holds {word}, expected finite numbers"):
        run(made, Quantize(weights))


def test_weights_of_zeros_stay_zero() -> None:
    made = one_layer()
    made.weights["weight"].zero_()

    for weights, method in ((8, "rtn"), ("fp8", "rtn"), (4, "mse"), (3, "mse")):
        after, _ = run(made, Quantize(weights, method=method))
        found = after.run("forward", {"x0": made.main.examples["x0"]})["y0"]
        assert found.equal(made.weights["bias"].expand_as(found))


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
        assert len(entry.calls(dialect.linear_w8.target)) == before
        assert len(entry.calls(dialect.dequantize_w8.target)) == 1
    kept = sum(t.numel() for k, t in after.weights.items() if t.dtype == torch.int8)
    assert kept == sum(
        language_model.weights[k.removesuffix(".int8")].numel() for k in after.weights if k.endswith("int8")
    )
    assert ledger.rows[0].after.parameter_bytes < 0.4 * ledger.rows[0].before.parameter_bytes


def test_the_ledger_says_what_changed_on_the_examples(language_model: Program) -> None:
    errors = {}
    for name, step in {"bf16": Quantize(16), "int8": Quantize(8)}.items():
        row = run(language_model, step)[1].rows[0]
        prefill, decode = row.measured
        assert (prefill.entry, prefill.output, decode.entry, decode.made_up) == ("prefill", "logits", "decode", True)
        assert row.error == max(prefill.largest, decode.largest)
        assert prefill.next_token is not None
        assert prefill.next_token.agreement > 0.8
        assert 0 <= prefill.next_token.kl < 0.05
        assert prefill.next_token.positions == 2 * 11
        errors[name] = prefill.error
        assert "top-1 agreement" in str(Ledger([row]))
        assert Ledger([row]).to_dict()[0]["measured"][0]["next_token"]["positions"] == 22
    assert 0 < errors["bf16"] < errors["int8"] < 0.2


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
@pytest.mark.parametrize("weights", [16, 8])
def test_reference_backend(name: str, weights: int) -> None:
    case = zoo.case(name)
    exact = zoo.tensors(case.model(**case.inputs))[0].detach()
    steps = (Quantize(weights), QuantizeCache(), QuantizeAttention())

    with sv.compile(case.model, case.inputs, target="reference", passes=steps) as compiled:
        found = compiled(**case.inputs)[0]

    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1
    assert compiled.manifest.passes == tuple(map(str, steps))


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


def test_names_of_passes_and_lists_of_them() -> None:
    assert resolve_passes(["canonicalize", "bf16"])[1:] == (Quantize(16), QuantizeCache(), QuantizeAttention())
    assert resolve_passes("fp16") == (Quantize("fp16"), QuantizeCache(), QuantizeAttention())
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
