"""Rotations on real architectures: exact, with the promised transforms, and through the cpu compiler."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf

import sylvester as sv
from sylvester.compiler.changes import Changes
from sylvester.compiler.check import evaluate
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.fold_norms import FoldNorms
from sylvester.passes.quantize import Quantize
from sylvester.passes.rotate_hadamard import RotateHadamard
from tests import zoo
from tests.nightly import by_night

HADAMARD = torch.ops.sylvester.hadamard.default
NORMS = (torch.ops.aten.layer_norm.default, torch.ops.sylvester.rms_norm.default)
OFF = {"residual": False, "values": False, "ffn": False}
STEPS = {
    "fold": FoldNorms(),
    "R1": RotateHadamard(**{**OFF, "residual": True}),
    "R2": RotateHadamard(**{**OFF, "values": True}),
    "R3": RotateHadamard(**OFF, keys=True),
    "R4": RotateHadamard(**{**OFF, "ffn": True}),
    "heads": RotateHadamard(**OFF, heads=True),
    "all": RotateHadamard(keys=True, heads=True),
    "offline": RotateHadamard(online=False),
}
DEFAULTS = {"llama-gqa": (0, 4, 8), "llama-tied": (0, 4, 8), "gpt2": (0, 4, 0), "opt": (0, 5, 0), "bert": (9, 4, 0)}
"""Transforms that each entry runs for R1, R4 and R3."""


@functools.cache
def traced(name: str) -> Program:
    case = zoo.case(name)
    return zoo.traced(case.name).clone()


def rotate(program: Program, *passes: Pass) -> tuple[Program, Changes]:
    done, ledger = Pipeline(passes).run(program)
    assert all(row.error is not None and row.error < 2e-5 for row in ledger.rows if row.contract == "exact")
    return done, ledger.rows[-1].changes


@torch.no_grad()
def logits(name: str, **inputs: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = zoo.case(name).model(**inputs).logits
    return result


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def transforms(program: Program) -> set[int]:
    """Per entry."""
    return {len(entry.calls(HADAMARD)) for entry in program.entries.values()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "name", by_night(["llama-gqa", "llama-tied", "gpt2", "opt", "vit", "bert"], ["llama-tied", "gpt2", "vit"])
)
def test_every_rotation_keeps_the_outputs(name: str, step: str) -> None:
    done, changes = rotate(traced(name), STEPS[step])

    counts = dict(zip(("R1", "R4", "R3"), DEFAULTS.get(name, ()), strict=False))
    if step in counts:
        assert transforms(done) == {counts[step]}
    if step in ("fold", "R1") and name in ("llama-gqa", "llama-tied", "gpt2", "opt"):
        norms = [norm for entry in done.entries.values() for norm in entry.calls(*NORMS)]
        assert all(isinstance(a, float | int | None) for norm in norms for a in norm.args[1:])
        assert {norm.target for norm in norms} == {NORMS[1]}
    if step == "offline" and name != "vit":
        assert transforms(done) == {0}
        assert changes.applied != []


def test_folded_rotations_add_no_run_time_nodes() -> None:
    program = traced("llama-gqa")
    nodes = {name: len(entry.calls()) for name, entry in program.entries.items()}

    done, changes = rotate(program, RotateHadamard(ffn=False))

    assert {name: len(entry.calls()) for name, entry in done.entries.items()} == nodes
    assert changes.refused == []


def test_bert_is_rotated_block_by_block_by_itself() -> None:
    done, changes = rotate(traced("bert"), RotateHadamard())

    assert changes.counts() == {"inputs": 9, "values": 4, "ffn": 4}
    assert "residual" in {refused.rule for refused in changes.refused}
    for key in ("embeddings.word_embeddings.weight", "encoder.layer.0.output.LayerNorm.weight"):
        assert torch.equal(done.weights[key], traced("bert").weights[key])


def test_refusals_say_where() -> None:
    _, changes = rotate(traced("bert"), RotateHadamard())

    where = {refused.where for refused in changes.refused if refused.rule == "residual"}
    assert any("encoder.layer.1.attention.output.LayerNorm" in place for place in where)


@pytest.mark.parametrize("tied", ["online", "split"])
def test_a_tied_model_at_other_sizes(tied: str) -> None:
    case = zoo.case("llama-tied")
    step = RotateHadamard(keys=True, heads=True, ffn=False, tied=tied)  # type: ignore[arg-type]

    done, _ = rotate(traced("llama-tied"), step)

    with sv.compile(done, target="reference") as compiled:
        for inputs in (case.inputs, *case.other):
            assert_same(compiled(**inputs).logits, logits("llama-tied", **inputs))


def test_the_seed_changes_weights_and_nothing_else() -> None:
    one, two = (rotate(traced("llama-gqa"), RotateHadamard(seed=seed))[0] for seed in (0, 7))

    assert set(one.weights) == set(two.weights)
    key = "model.embed_tokens.weight"
    assert not torch.allclose(one.weights[key], two.weights[key], atol=1e-2)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_rotated_program_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    done, _ = rotate(traced(name), RotateHadamard(keys=True, heads=True))

    done.save(tmp_path / "program")
    again = Program.load(tmp_path / "program")

    old, new = evaluate(done), evaluate(again)
    assert all(torch.equal(old[entry][key], new[entry][key]) for entry in old for key in old[entry])
    assert all(torch.equal(done.weights[key], again.weights[key]) for key in done.weights)
    assert str(done) == str(again)


@pytest.mark.parametrize("name", ["llama-gqa", "bert"])
def test_rotation_after_quantisation_refuses_what_it_cannot_change(name: str) -> None:
    _done, changes = rotate(traced(name), Quantize(), RotateHadamard(keys=True, heads=True))

    assert "residual" not in changes.counts()
    assert any("reads a weight of int8, only float32" in refused.reason for refused in changes.refused)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_twice_is_exact(name: str) -> None:
    rotate(traced(name), RotateHadamard(keys=True, heads=True), RotateHadamard(keys=True, heads=True, seed=1))


def test_half_precision_models_are_refused_with_a_reason() -> None:
    model = copy.deepcopy(zoo.case("gpt2").model).bfloat16()

    _, ledger = Pipeline((RotateHadamard(heads=True),)).run(sv.trace(model, zoo.case("gpt2").inputs))

    assert ledger.rows[0].error == 0
    reasons = {refused.reason for refused in ledger.rows[0].changes.refused if refused.rule == "values"}
    assert reasons == {"linear reads a weight of bfloat16, only float32 can be rotated"}


@pytest.mark.parametrize("name", ["llama-tied"])
def test_generation_in_the_rotated_basis(name: str) -> None:
    """Caches hold rotated keys and values; the tokens are those of the model, which runs the whole sequence anew."""
    case = zoo.case(name)
    ids = case.inputs["input_ids"][:1]
    rotation = RotateHadamard(keys=True, heads=True)

    with sv.compile(traced(name), target=sv.Target("cpu", isas=("avx2",)), passes=[rotation]) as compiled:
        produced = torch.as_tensor(compiled.generate(ids.numpy(), max_new_tokens=8, stop=()))
        assert_same(compiled(**case.other[0]).logits, logits(name, **case.other[0]))

    sequence = ids
    for _ in range(8):
        sequence = torch.cat((sequence, logits(name, input_ids=sequence)[:, -1:].argmax(-1)), 1)
    assert produced[0].tolist()[-8:] == sequence[0, -8:].tolist()


SMALL = {
    "vocab_size": zoo.VOCAB, "use_cache": False, "pad_token_id": None, "num_hidden_layers": 2, "hidden_size": 48,
    "intermediate_size": 104, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {**zoo.BERT, "num_hidden_layers": 2, "vocab_size": zoo.VOCAB}
MODELS = {
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**SMALL, head_dim=12, sliding_window=8), zoo.token_ids),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(**SMALL, **zoo.ENDS), zoo.token_ids),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**{**SMALL, "eos_token_id": 2}), zoo.token_ids),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=zoo.VOCAB, hidden_size=48, n_layer=2, n_head=4, use_cache=False, **zoo.ENDS),
        zoo.token_ids,
    ),
    "albert": (hf.AlbertModel, hf.AlbertConfig(**ENCODER, embedding_size=24, **zoo.ENDS), zoo.masked_ids),
    "beit": (
        hf.BeitModel,
        hf.BeitConfig(
            hidden_size=48,
            intermediate_size=104,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=24,
            patch_size=8,
        ),
        zoo.images(24),
    ),
}
ROLES = {
    "gemma2": {"residual": 1, "values": 2, "ffn": 2},
    "phi3": {"residual": 1, "values": 2, "ffn": 2},
    "olmo2": {"residual": 1, "values": 2, "ffn": 2, "inputs": 0},
    "bloom": {"residual": 1, "inputs": 3, "values": 2, "ffn": 2},
    "albert": {"residual": 1, "inputs": 5, "values": 1, "ffn": 2},
    "beit": {"inputs": 4, "values": 2, "ffn": 2},
}


@pytest.mark.parametrize("name", by_night(MODELS, ["gemma2", "bloom"]))
def test_models_that_the_pass_was_not_made_for(name: str) -> None:
    cls, config, sample = MODELS[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    zoo.randomise(model)
    program = sv.trace(model, sample(2, 11))

    _, changes = rotate(program, RotateHadamard())
    rotate(program, RotateHadamard(keys=True, heads=True, tied="online"))

    roles = Counter(done.rule for done in changes.applied if done.rule in ("residual", "inputs", "values", "ffn"))
    entries = len(program.entries)
    assert {rule: -(-count // entries) if rule == "ffn" else count for rule, count in roles.items()} == {
        rule: count for rule, count in ROLES[name].items() if count
    }
