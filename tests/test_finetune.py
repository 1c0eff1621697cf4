"""Fine-tuning a Program: it learns, leaves its input alone, resumes with equal results, and says what is wrong."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import sylvester as sv
from sylvester.compiler import ops
from sylvester.compiler.batches import Batches, windows
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.descent import Descent
from sylvester.compiler.differentiable import Function, fused_attention
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.quality import drift, perplexity
from sylvester.compiler.resolve import expand, resolve_passes
from sylvester.compiler.samples import read
from sylvester.compiler.student import Student, generates_otherwise
from sylvester.compiler.verify import verify
from sylvester.passes.finetune import Finetune
from tests import graphs, zoo

DATA = tuple(torch.randint(3, zoo.VOCAB, (40,), generator=torch.Generator().manual_seed(n)) for n in range(4))
FAST = {"batch": 2, "window": 20, "learning_rate": 3e-3}


@functools.cache
def traced(name: str = "llama-gqa") -> sv.Program:
    case = zoo.case(name)
    return zoo.traced(case.name).clone()


@functools.cache
def skipping() -> sv.Program:
    """Decoding leaves out two of the four layers."""
    return Pipeline((sv.passes.SkipLayers(layers=(1, 2)),))(traced())


def rounded(recipe: str) -> sv.Program:
    program = traced()
    return Pipeline(expand(resolve_passes(recipe), program, None).passes)(program)


def moved(before: sv.Program, after: sv.Program) -> set[str]:
    return {key for key in before.weights if not torch.equal(before.weights[key], after.weights[key])}


def noisy(program: sv.Program, factor: float = 0.3) -> sv.Program:
    """A clone whose matrices are a little off."""
    random, other = torch.Generator().manual_seed(0), program.clone()
    for key, tensor in program.weights.items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random)
            other.weights[key] = tensor + factor * tensor.std() * noise
    return other


def test_a_language_model_learns_its_data_and_stays_itself():
    program = traced()
    before = {key: tensor.clone() for key, tensor in program.weights.items()}
    trained = sv.finetune(program, DATA, 12, **FAST)
    samples = read(program, DATA)
    assert perplexity(trained, samples) < 0.5 * perplexity(program, samples)
    assert all(torch.equal(program.weights[key], tensor) for key, tensor in before.items())
    verify(trained)


def test_a_teacher_is_imitated():
    teacher = traced()
    student = noisy(teacher)
    trained = sv.finetune(student, DATA, 12, teacher=teacher, tail=0.3, **FAST)
    before, after = (drift(teacher, p, read(teacher, DATA))[0].error for p in (student, trained))
    assert after < 0.8 * before


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_other_programs_regress_to_their_teacher(name):
    teacher, case = traced(name), zoo.case(name)
    student = noisy(teacher)
    trained = sv.finetune(student, [case.inputs], 6, teacher=teacher, batch=1, learning_rate=1e-3)
    before, after = (sum(d.error for d in drift(teacher, p, [case.inputs])) for p in (student, trained))
    assert after < before


def test_tied_weights_are_one_parameter_and_stay_tied():
    program = traced("llama-tied")
    (key,) = set(program.weights.aliases.values())
    trained = sv.finetune(program, DATA, 2, embeddings=True, **FAST)
    assert key in moved(program, trained)
    assert list(trained.weights) == list(program.weights)
    assert trained.weights.aliases == program.weights.aliases


def test_only_what_meets_data_is_trained():
    program = traced()
    changed = moved(program, sv.finetune(program, DATA, 2, **FAST))
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert "model.norm.weight" in changed
    assert "model.rotary_emb.inv_freq" not in changed
    assert "model.embed_tokens.weight" not in changed


def test_weights_are_chosen_by_pattern():
    program = traced()
    changed = moved(program, sv.finetune(program, DATA, 2, weights="*mlp*", **FAST))
    assert changed == {key for key in program.weights if "mlp" in key}
    both = moved(program, sv.finetune(program, DATA, 2, weights=("*q_proj*", "model.norm.*"), **FAST))
    assert both == {key for key in program.weights if "q_proj" in key} | {"model.norm.weight"}


def test_a_table_that_is_left_alone_is_noted():
    trained = sv.finetune(traced(), DATA, 1, **FAST)
    assert [n for n in trained.info["notes"] if "tables that tokens are looked up in" in n]
    assert not [n for n in traced().info["notes"] if "fine-tuning" in n]


def test_quantised_layers_stay_as_they_are():
    program = rounded("w8a16")
    trained = sv.finetune(program, DATA, 2, **FAST)
    assert moved(program, trained) == {key for key in program.weights if "norm" in key}
    assert [n for n in trained.info["notes"] if "quantised layers" in n]


def test_nothing_to_train_is_an_error():
    program = rounded("w8a16")
    with pytest.raises(CompileError, match=r"nothing is trainable: .* quantised"):
        sv.finetune(program, DATA, 2, weights="*proj*", **FAST)
    with pytest.raises(CompileError, match="no weight matches"):
        sv.finetune(traced(), DATA, 2, weights="*no such*", **FAST)


def test_weights_of_half_precision_keep_their_type():
    program = rounded("bf16")
    trained = sv.finetune(program, DATA, 3, **FAST)
    halves = {key for key, tensor in program.weights.items() if tensor.dtype == torch.bfloat16}
    assert halves & moved(program, trained)
    assert all(trained.weights[key].dtype == tensor.dtype for key, tensor in program.weights.items())


def test_generation_that_skips_layers_is_trained_as_it_runs():
    teacher, student = traced(), skipping()
    assert generates_otherwise(student)
    assert not generates_otherwise(teacher)
    trained = sv.finetune(student, DATA, 6, teacher=teacher, **FAST)
    before, after = (generated_kl(teacher, p) for p in (student, trained))
    assert after < 0.9 * before


def test_rounded_caches_are_trained_around_and_noted():
    program = Pipeline((sv.passes.QuantizeCache(bits=8),))(skipping())
    trained = sv.finetune(program, DATA, 1, **FAST)
    assert [n for n in trained.info["notes"] if "caches are rounded" in n]
    assert "model.norm.weight" in moved(program, trained)


def generated_kl(teacher: sv.Program, program: sv.Program, prompt: int = 10) -> float:
    """Of the tokens that follow a prompt, read through prefill and decode by `Program.run`."""
    total = 0.0
    for ids in DATA:
        tokens = ids[None]
        whole = Student(teacher, staged=False)(teacher.weights, {"input_ids": tokens}, 0).values["logits"]
        state = {key: torch.zeros(1, slot.shape[1], 40, slot.shape[3]) for key, slot in program.state.items()}
        found = program.run("prefill", {"input_ids": tokens[:, :prompt]}, state)
        state = {key: found[key] for key in program.state}
        rest = program.run("decode", {"input_ids": tokens[:, prompt:], "past": torch.tensor(prompt)}, state)
        old, new = (t.log_softmax(-1) for t in (whole[:, prompt:], rest["logits"]))
        total += float((old.exp() * (old - new)).sum(-1).mean())
    return total


def test_what_a_student_computes_is_what_the_entries_do():
    program = skipping()
    student = Student(program)
    tokens = torch.stack(DATA[:2])
    answer = student(program.weights, {"input_ids": tokens}, 1)
    prompt = answer.first
    assert prompt == 10
    state = {key: torch.zeros(2, slot.shape[1], 40, slot.shape[3]) for key, slot in program.state.items()}
    state = program.run("prefill", {"input_ids": tokens[:, :prompt]}, state) | {}
    given = {key: state[key] for key in program.state}
    wanted = program.run("decode", {"input_ids": tokens[:, prompt:], "past": torch.tensor(prompt)}, given)
    torch.testing.assert_close(answer.values["logits"], wanted["logits"])


def test_gradients_are_those_of_the_model():
    case = zoo.case("gpt2")
    program = traced("gpt2")
    key = "transformer.h.2.mlp.c_fc.weight.t"
    leaf = program.weights[key].clone().requires_grad_()
    function = Function.of(program.main, ["logits"])
    ids = case.inputs["input_ids"]
    scores = function(dict(program.weights) | {key: leaf}, {"input_ids": ids}, {})["logits"]
    (found,) = torch.autograd.grad(scores.square().mean(), leaf)
    weight = case.model.transformer.h[2].mlp.c_fc.weight
    (wanted,) = torch.autograd.grad(case.model(**case.inputs).logits.square().mean(), weight)
    torch.testing.assert_close(found.T, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("past", "causal", "window", "mask"),
    [(None, True, 0, False), (None, False, 0, False), (6, True, 0, False), (6, True, 3, False), (None, True, 2, False),
     (None, False, 4, False), (None, True, 0, True), (None, False, 0, True), (None, True, 3, True)],
)  # fmt: skip
def test_fused_attention_and_its_gradient(past, causal, window, mask):
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 11 if past else 5, 8, requires_grad=True) for _ in "kv")
    hidden = torch.rand(5, 5) < 0.7 if mask else None
    args = (q, k, v, hidden, None if past is None else torch.tensor(past), 0.3, causal, window)
    results = [f(*args) for f in (fused_attention, ops.attention.reference)]
    torch.testing.assert_close(*results)
    found, wanted = (torch.autograd.grad(r.square().sum(), (q, k, v)) for r in results)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        (None, "there is no data"),
        ("text", "data is a str"),
        ([torch.tensor([3])], "data sample 0 has 1 tokens"),
        ([torch.tensor([3, 4])], "no window of at least 3 tokens"),
        ([torch.tensor([3, 4, 5000])], "data sample 0: input 'input_ids' holds the id 5000"),
        (["text"], "the model has no tokenizer"),
    ],
)
def test_bad_data_is_an_error(data, message):
    with pytest.raises(CompileError, match=message):
        sv.finetune(traced(), data, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0, expected at least 1"),
        ({"steps": 1.5}, TypeError, "steps is a float"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"window": 2}, ValueError, "window is 2"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0, expected more than"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate is nan"),
        ({"tail": -1.0}, ValueError, "tail is -1.0"),
        ({"tail": 0.5}, CompileError, "tail needs a teacher"),
    ],
)
def test_bad_options_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        sv.finetune(traced(), DATA, **({"steps": 1} | options))


def test_a_teacher_with_other_outputs_is_an_error():
    other = graphs.decoder(vocabulary=31)
    other.info["kind"] = "causal-lm"
    with pytest.raises(CompileError, match=r"the teacher gives .*, the program"):
        sv.finetune(traced(), DATA, 1, teacher=traced("bert"))
    with pytest.raises(CompileError, match="the teacher gives"):
        sv.finetune(traced(), DATA, 1, teacher=other)


def test_without_next_token_or_teacher_there_is_nothing_to_learn():
    with pytest.raises(CompileError, match="nothing to learn without a teacher"):
        sv.finetune(traced("bert"), [zoo.case("bert").inputs], 1)


class Rounded(nn.Module):
    """Nothing that comes before the rounding has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).to(torch.int32).float())


def test_weights_behind_a_rounding_are_noted():
    program = sv.trace(Rounded(), (torch.randn(4, 6),))
    data = [(9 * torch.randn(4, 6),)]
    trained = sv.finetune(program, data, 2, teacher=noisy(program), batch=1)
    assert moved(program, trained) == {"second.weight", "second.bias"}
    assert [n for n in trained.info["notes"] if "no gradient reaches them" in n]
    with pytest.raises(CompileError, match="no weight has a gradient"):
        sv.finetune(program, data, 1, teacher=program, batch=1, weights="first*")


def test_each_window_comes_once_before_any_comes_again():
    program = traced()
    samples = windows(program, read(program, [torch.cat(DATA)[None, :110]]), 20)
    assert [s["input_ids"].shape[1] for s in samples] == [20] * 5 + [10]
    batches = Batches(program, samples, 4, 5)
    order = [number for step in range(9) for part in batches.at(step) for number in part.numbers]
    assert sorted(order) == sorted([*range(6)] * 6)
    assert {*order[:4]} != {*order[12:16]}
    fresh = Batches(program, samples, 4, 5)
    assert [p.numbers for p in fresh.at(7)] == [p.numbers for p in batches.at(7)]
    assert sum(part.share for part in batches.at(2)) == pytest.approx(1)


def test_the_data_to_fit_to_is_what_a_calibration_trains_on():
    data = Calibration(({"input_ids": DATA[0][None]},), ({"input_ids": DATA[1][None]},))
    assert not moved(sv.finetune(traced(), data, 2, **FAST), sv.finetune(traced(), [DATA[0]], 2, **FAST))


def test_the_rate_warms_up_and_falls_to_zero():
    descent = Descent({"w": torch.zeros(1)}, 100, 1.0)
    rates = []
    for descent.done in range(100):
        rates.append(descent.rate())
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(a >= b for a, b in pairwise(rates[2:]))
    assert rates[-1] < 1e-3


def test_progress_tells_the_loss_and_the_pace():
    seen = []
    sv.finetune(traced(), DATA, 2, **FAST, progress=lambda *at: seen.append(at))
    assert [(done, total) for _, done, total in seen] == [(1, 2), (2, 2)]
    assert all(stage.startswith("fine-tune: loss ") and stage.endswith(" tokens/s") for stage, _, _ in seen)


@pytest.mark.parametrize(("program", "teacher"), [("folder", None), (None, "folder")])
def test_what_is_no_program_is_an_error(program, teacher):
    with pytest.raises(TypeError, match="is a str, expected a Program"):
        sv.finetune(program or traced(), DATA, 1, teacher=teacher)


def test_the_pass_trains_on_calibration_data():
    program = traced().clone()
    program.calibration = Calibration(read(program, DATA))
    after, ledger = Pipeline((Finetune(4, **FAST),)).run(program)
    changes = ledger.rows[0].changes
    assert {a.where for a in changes.applied} == moved(program, after)
    assert perplexity(after, read(program, DATA)) < perplexity(program, read(program, DATA))
    assert changes.notes[0].startswith("perplexity on the data it trained on: ")
    assert not [note for note in after.info["notes"] if "fine-tuning" in note]


def test_the_pass_needs_data_and_a_language_model():
    with pytest.raises(CompileError, match="there is no data to train on"):
        Pipeline((Finetune(),)).run(traced())
    with pytest.raises(CompileError, match="scores no next token"):
        Pipeline((Finetune(),)).run(traced("bert"))
