"""Hugging Face folders: what is loaded computes what transformers computes; what is missing is named."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from sylvester.compiler.check import relative_error
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface import facts_of, load_folder
from sylvester.compiler.trace import capture
from tests import zoo


def folder_of(model, path, **options):
    bars = hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    model.save_pretrained(path, **options)
    if bars:
        hf.utils.logging.enable_progress_bar()
    return path


@pytest.fixture
def llama(tmp_path):
    return folder_of(zoo.case("llama-gqa").model, tmp_path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in config.items() if item is not ...}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "max_length"),
    [
        ("llama-tied", "causal-lm", {"input_ids": (2, 11)}, 128),
        ("gpt2", "causal-lm", {"input_ids": (2, 11)}, 64),
        ("opt", "causal-lm", {"input_ids": (2, 11)}, 64),
        ("bert", "encoder", {"input_ids": (2, 11), "attention_mask": (2, 11)}, 64),
        ("roberta", "encoder", {"input_ids": (2, 11), "attention_mask": (2, 11)}, 62),
        ("t5", "seq2seq", {"input_ids": (2, 11), "decoder_input_ids": (2, 7)}, None),
        ("t5-encoder", "encoder", {"input_ids": (2, 11), "attention_mask": (2, 11)}, None),
        ("vit", "image", {"pixel_values": (2, 3, 24, 24)}, None),
    ],
)
def test_folder(name, kind, inputs, max_length, tmp_path):
    original = zoo.case(name).model

    model, examples, info = load_folder(folder_of(original, tmp_path))

    with torch.no_grad():
        found, expected = model(**examples), original(**examples)
    assert max(relative_error(expected[k], found[k]) for k in expected if isinstance(expected[k], torch.Tensor)) < 1e-6
    assert {key: tuple(x.shape) for key, x in examples.items()} == inputs
    assert (info["kind"], info.get("max_length"), info["tokenizer"]) == (kind, max_length, None)
    assert not model.training


def test_capture_of_a_folder(llama):
    (llama / "tokenizer.json").write_text("{}")

    program = capture(llama)

    expected = zoo.case("llama-gqa").model(**program.main.examples).logits
    torch.testing.assert_close(program.run("forward", program.main.examples)["logits"], expected.detach())
    assert program.info["tokenizer"] == str(llama / "tokenizer.json")
    assert program.info["eos_token_ids"] == [2]
    json.dumps(program.info)


def test_capture_takes_other_examples(llama):
    ids = torch.randint(zoo.VOCAB, (3, 5))

    assert capture(llama, {"input_ids": ids}).main.examples["input_ids"].shape == (3, 5)


def test_sharded_weights(tmp_path):
    original = zoo.case("llama-gqa").model
    folder = folder_of(original, tmp_path, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1

    model, examples, _ = load_folder(folder)

    torch.testing.assert_close(model(**examples).logits, original(**examples).logits)


def test_missing_shard_is_named(tmp_path):
    folder = folder_of(zoo.case("llama-gqa").model, tmp_path, max_shard_size="200KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(CompileError, match=f"missing weight files .*{shard.name}"):
        load_folder(folder)


def test_half_precision_is_widened(tmp_path):
    with torch.random.fork_rng():
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=zoo.VOCAB, **zoo.GQA)).to(torch.bfloat16)

    loaded, _, _ = load_folder(folder_of(model, tmp_path))

    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_tied_weights_stay_tied(tmp_path):
    program = capture(folder_of(zoo.case("llama-tied").model, tmp_path))

    assert list(program.weights.aliases) == ["lm_head.weight"]


def test_an_architecture_without_scaled_dot_product_attention(tmp_path):
    config = hf.Gemma2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Gemma2ForCausalLM(config).eval()
    loaded, ids = load_folder(folder_of(model, tmp_path))[0], torch.randint(99, (2, 7))
    with torch.no_grad():
        assert relative_error(model(ids).logits, loaded(ids).logits) < 1e-5


def test_folder_without_an_architecture(tmp_path):
    folder = folder_of(zoo.case("bert").model, tmp_path)
    edit_config(folder, architectures=...)

    assert type(load_folder(folder)[0]).__name__ == "BertModel"


def test_several_end_tokens(llama):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))

    assert load_folder(llama)[2]["eos_token_ids"] == [2, 7]


def test_model_without_a_config_has_no_facts():
    assert facts_of(torch.nn.Linear(2, 2)) == {}


def test_missing_config(tmp_path):
    with pytest.raises(CompileError, match=r"there is no config.json"):
        load_folder(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a list, expected an object")])
def test_broken_config(text, message, llama):
    (llama / "config.json").write_text(text)

    with pytest.raises(CompileError, match=message):
        load_folder(llama)


def test_missing_weights(llama):
    (llama / "model.safetensors").unlink()

    with pytest.raises(CompileError, match=r"there is no model.safetensors"):
        load_folder(llama)


def test_pickled_weights_are_refused(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")

    with pytest.raises(CompileError, match="are pickles"):
        load_folder(llama)


def test_truncated_weights(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])

    with pytest.raises(CompileError, match="cannot load"):
        load_folder(llama)


def test_missing_tensor(llama):
    edit_weights(llama, lambda tensors: tensors.pop("model.norm.weight"))

    with pytest.raises(CompileError, match=r"lack 1 tensors, the first is 'model.norm.weight'"):
        load_folder(llama)


def test_tensor_of_another_shape(llama):
    edit_weights(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))

    with pytest.raises(CompileError, match=r"weight 'model.norm.weight' is \[32\], the config makes it \[64\]"):
        load_folder(llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, "unknown architecture 'NoSuchModel'"),
        ({"architectures": ..., "model_type": "no-such-type"}, "cannot load"),
        ({"quantization_config": {"quant_method": "gptq"}}, "are quantized"),
    ],
)
def test_refused_config(changes, message, llama):
    edit_config(llama, **changes)

    with pytest.raises(CompileError, match=message):
        load_folder(llama)


def test_without_transformers(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(CompileError, match="needs transformers") as caught:
        load_folder(llama)

    assert "pip install 'sylvester[hf]'" in caught.value.hint


def test_says_nothing_and_puts_settings_back(llama, capfd):
    edit_weights(llama, lambda tensors: tensors.update({"extra": torch.ones(3)}))
    log = hf.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())

    load_folder(llama)

    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert before[0] < logging.CRITICAL


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"w": "../other/model.safetensors"}, "expected one in the same folder"),
        ({"w": 3}, "names the file 3"),
        ([], "is a list, expected an object"),
    ],
)
def test_index_that_names_no_files_of_the_folder(llama, places, message):
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    with pytest.raises(CompileError, match=message):
        load_folder(llama)
