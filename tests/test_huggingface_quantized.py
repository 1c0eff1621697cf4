"""Folders with rounded weights: transformers computes what the program computes, and a capture gives it back."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import sylvester as sv
import sylvester.transformers  # registers the loader
from sylvester.__main__ import main
from sylvester.compiler import huggingface_export
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.check import ROUNDED, evaluate, relative_error, require_same, rounds
from sylvester.compiler.errors import CompileError, ContractBroken
from sylvester.compiler.huggingface_modules import Absent, QuantisedLinear
from sylvester.compiler.huggingface_quantized import Format, parse_modules
from sylvester.compiler.layers import find_layers
from sylvester.compiler.pipeline import Pipeline
from sylvester.passes import FoldNorms, Quantize, QuantizeAttention, QuantizeCache, RotateHadamard
from sylvester.passes.drop_sublayers import DropSublayers
from tests import zoo
from tests.test_huggingface import edit_config, folder_of
from tests.test_huggingface_export import PROMPT, SMALL, read, shared

WIDE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "LlamaForCausalLM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **WIDE)),
    "Qwen2ForCausalLM": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, **WIDE, tie_word_embeddings=True)),
    "GPT2LMHeadModel": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    ),
}
LLAMA, QWEN2, GPT2 = MODELS
TURN = RotateHadamard(ffn=False, online=False)
FIRST = DropSublayers(attention=(0,), ffn=(2,))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder and program of an architecture, captured once."""
    made = {}

    def source(name):
        if name not in made:
            model = MODELS[name]()
            zoo.randomise(model)
            folder = folder_of(model, tmp_path_factory.mktemp("source"))
            made[name] = (folder, sv.trace(folder))
        return made[name]

    return source


@pytest.fixture(autouse=True)
def captured_once(sources, monkeypatch):
    monkeypatch.setattr(huggingface_export, "trace", lambda model, examples: sources(type(model).__name__)[1].clone())


@pytest.fixture(autouse=True)
def silent():
    log = hf.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    yield
    log.set_verbosity(level)
    log.enable_progress_bar()


def passed(program, *steps):
    return Pipeline(steps, check=False).run(program)[0]


@pytest.fixture(scope="module")
def rounded(sources):
    return passed(sources(LLAMA)[1], Quantize(weights=8))


def generated(model, **options):
    mask = torch.ones_like(PROMPT)
    return model.generate(PROMPT, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0, **options)


def agrees(program, folder):
    """Logits and greedy tokens of transformers are those of the program; returns the model."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found = model(PROMPT).logits
    with sv.compile(program, target="reference") as compiled:
        assert relative_error(compiled(input_ids=PROMPT).logits, found) < 1e-5
        assert compiled.generate(PROMPT, max_new_tokens=7).tolist() == generated(model).tolist()
    return model


def same(first, second):
    a, b = evaluate(first), evaluate(second)
    assert list(a) == list(b)
    assert all(torch.equal(a[entry][name], b[entry][name]) for entry in a for name in a[entry])


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_int8(rounded, tmp_path):
    model = agrees(rounded, rounded.export_hf(tmp_path / "out"))
    config, tensors, _ = read(tmp_path / "out")

    form = {"op": "linear", "bits": 8, "group": 0, "activations": 8}
    assert config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"] == form
    assert tensors["model.layers.1.mlp.up_proj.weight_packed"].dtype == torch.int8
    assert "model.layers.1.mlp.up_proj.weight" not in tensors
    assert nbytes(tensors) <= rounded.weights.nbytes
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantisedLinear)
    assert model.hf_quantizer.is_serializable()


def test_tied_tables_are_stored_once_and_read_back(sources, tmp_path):
    program = passed(sources(QWEN2)[1], Quantize(weights=4))

    model = agrees(program, program.export_hf(tmp_path / "out"))
    config, tensors, metadata = read(tmp_path / "out")
    loaded = sv.trace(tmp_path / "out")

    assert metadata["alias:lm_head.weight_packed"] == "model.embed_tokens.weight_packed"
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert config["quantization_config"]["modules"]["model.embed_tokens"] == {"op": "embedding", "bits": 4, "group": 0}
    assert nbytes(tensors) <= program.weights.nbytes
    assert loaded.weights.nbytes == program.weights.nbytes
    assert len(find_layers(loaded)) == 3
    same(program, loaded)


def test_transposed_weights_static_steps_and_shared_layers(sources, tmp_path):
    program = shared(sources(GPT2)[1])
    program.calibration = Calibration(({"input_ids": torch.arange(20, 33)[None]},), ({"input_ids": PROMPT},))
    program = passed(program, Quantize(weights=8, static=True))

    agrees(program, program.export_hf(tmp_path / "out"))
    config, tensors, metadata = read(tmp_path / "out")

    assert config["quantization_config"]["modules"]["transformer.h.0.attn.c_attn"]["static"] is True
    assert tensors["transformer.h.1.attn.c_attn.weight_packed"].shape == (96, 32)
    assert metadata["alias:transformer.h.2.attn.c_attn.weight_packed"] == "transformer.h.1.attn.c_attn.weight_packed"
    assert not [name for name in tensors if ".2." in name]
    assert nbytes(tensors) <= program.weights.nbytes


@pytest.mark.parametrize("name", [LLAMA, QWEN2])
def test_folded_rotations_are_plain_weights(name, sources, tmp_path):
    program = passed(sources(name)[1], TURN, Quantize(weights=4, skip=("*.1.mlp.*",)))

    agrees(program, program.export_hf(tmp_path / "out"))
    config, tensors, metadata = read(tmp_path / "out")

    assert config["tie_word_embeddings"] is False
    assert not [alias for alias in metadata if "lm_head" in alias]
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32


def test_float_weights_that_were_rotated_need_no_loader(sources, tmp_path):
    program = passed(sources(QWEN2)[1], TURN)

    program.export_hf(tmp_path / "out")

    assert "quantization_config" not in read(tmp_path / "out")[0]
    agrees(program, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "steps"),
    [(LLAMA, [Quantize(weights=4, activations=None)]), (GPT2, [])],
)
def test_skipped_parts_are_left_out_of_generation(name, steps, sources, tmp_path):
    program = passed(sources(name)[1], FIRST, *steps)

    model = agrees(program, program.export_hf(tmp_path / "out"))
    config, tensors, _ = read(tmp_path / "out")

    assert len([module for module in model.modules() if isinstance(module, Absent)]) == 2
    assert generated(model, cache_implementation="static").tolist() == generated(model).tolist()
    assert generated(model, num_beams=2).shape[0] == 1
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}
    assert nbytes(tensors) <= program.weights.nbytes
    assert [name for name in tensors if ".0." in name and "attn" in name] == []


def test_skipped_parts_of_rounded_programs_are_read_back(sources, tmp_path):
    program = passed(sources(LLAMA)[1], FIRST, Quantize(weights=3))

    loaded = sv.trace(program.export_hf(tmp_path / "out"))
    loaded.export_hf(tmp_path / "again")

    same(program, loaded)
    assert loaded.weights.nbytes == program.weights.nbytes
    assert loaded.info["skipped"] == program.info["skipped"]


def test_models_are_saved_by_transformers(sources, tmp_path):
    program = passed(sources(QWEN2)[1], Quantize(weights=8))
    model = hf.AutoModelForCausalLM.from_pretrained(program.export_hf(tmp_path / "out"))

    model.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")

    assert torch.equal(model(PROMPT).logits, again(PROMPT).logits)
    assert nbytes(load_file(tmp_path / "saved" / "model.safetensors")) == nbytes(read(tmp_path / "out")[1])


def test_tokenizers_go_along(sources, rounded, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program = rounded.clone()
    program.info["tokenizer"] = str(tmp_path / "tokenizer.json")

    program.export_hf(tmp_path / "out")

    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w17").input_ids == [5, 17]


def test_without_the_loader_nothing_is_made_up(rounded, tmp_path, monkeypatch):
    folder = rounded.export_hf(tmp_path / "out")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "sylvester")

    with pytest.raises(FileNotFoundError, match=r"needs-import-sylvester\.transformers"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((QuantizeCache(),), r"the cache 'k0' holds torch.bfloat16, the architecture has torch.float32"),
        ((Quantize(kv=8),), r"the cache 'k0' holds torch.uint8"),
        ((QuantizeAttention(),), r"attention_bf16\(.*\) made by 'quantize-attention' at model.layers.1.self_attn"),
        ((Quantize("fp8"),), r"linear_fp8\(.*\) made by 'quantize' at model.layers.2.self_attn"),
        ((FoldNorms(), RotateHadamard()), r"hadamard\(.*\) made by 'rotate-hadamard' at model.layers.1.mlp"),
    ],
)
def test_what_a_folder_cannot_say_is_named(steps, message, sources, tmp_path):
    with pytest.raises(CompileError, match=message) as caught:
        passed(sources(LLAMA)[1], *steps).export_hf(tmp_path / "out")

    assert "hint: leave out" in " ".join(caught.value.__notes__)
    assert not (tmp_path / "out").exists()


def test_split_layers_are_named(sources, tmp_path):
    with pytest.raises(CompileError, match=r"made by 'split-linears' at transformer\.h\.2\.attn"):
        passed(sources(GPT2)[1], TURN).export_hf(tmp_path / "out")


def test_transformers_alone_has_no_such_layers(rounded, tmp_path):
    with pytest.raises(CompileError, match="has no layer for the rounded weight of 'lm_head'") as caught:
        rounded.export_hf(tmp_path / "out", stock=True)

    assert "leave out `stock`" in " ".join(caught.value.__notes__)


def test_results_are_compared_before_a_folder_is_kept(rounded, tmp_path, monkeypatch):
    wrong = {"logits": torch.zeros(2, 11, 97)}
    monkeypatch.setattr(huggingface_export, "run_stock", lambda folder, inputs: wrong)

    with pytest.raises(CompileError, match="'logits' of transformers differs by"):
        rounded.export_hf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, expected 1"),
        ({"modules": {"model.layers.7.x": {"op": "linear", "bits": 8}}}, "has no module 'model.layers.7.x'"),
        ({"modules": {"lm_head": {"op": "embedding", "bits": 8}}}, "'lm_head' is a Linear, the config has a embedding"),
        ({"refused": "a part is not a module"}, "cannot run this folder: a part is not a module"),
    ],
)
def test_folders_that_cannot_be_loaded_say_so(changes, message, rounded, tmp_path):
    folder = rounded.export_hf(tmp_path / "out")
    config = read(folder)[0]
    edit_config(folder, quantization_config=config["quantization_config"] | changes)

    with pytest.raises(CompileError, match=message):
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_lost_tensors_and_skips_in_decoding_are_named(rounded, tmp_path):
    folder = rounded.export_hf(tmp_path / "out")
    _, tensors, metadata = read(folder)
    save_file({k: t for k, t in tensors.items() if k != "lm_head.weight_scale"}, folder / "model.safetensors", metadata)

    with pytest.raises(CompileError, match=r"the files lack 'lm_head.weight_scale'"):
        hf.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CompileError, match=r"lack 1 tensors, the first is 'lm_head.weight_scale'"):
        sv.trace(folder)
    edit_config(folder, sylvester_decode_skip={"ffn": [1]})
    with pytest.raises(CompileError, match=r"cannot skip \{'ffn': \[1\]\} in decoding"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("int8", "has str, expected some of"),
        ({"op": "linear"}, r"has \['op'\], expected some of"),
        ({"op": "conv", "bits": 8}, "has op='conv', expected one of"),
        ({"op": "linear", "bits": 5}, "has bits=5, expected one of"),
        ({"op": "linear", "bits": 4, "group": 16}, "has group=16, expected one of"),
    ],
)
def test_malformed_formats_are_named(form, message):
    with pytest.raises(CompileError, match=message):
        parse_modules({"version": 1, "modules": {"lm_head": form}})


def test_exact_passes_over_rounded_rows_may_move_the_last_bit(sources, rounded):
    before, near, far = ({"forward": {"y": torch.tensor([1.0, x])}} for x in (0.5, 0.51, 0.6))

    read = rounded.clone()
    read.info["config"] = {**read.info["config"], "quantization_config": {"quant_method": "sylvester"}}
    assert rounds(read)
    assert not rounds(rounded)
    assert not rounds(sources(LLAMA)[1])
    assert require_same(before, near, ROUNDED) == pytest.approx(0.01)
    with pytest.raises(ContractBroken, match="expected at most 5e-02"):
        require_same(before, far, ROUNDED)
    with pytest.raises(ContractBroken, match="expected at most 1e-04"):
        require_same(before, near)


def test_formats_are_written_and_read_back():
    for form in (Format("linear", 4, 32, 8, True), Format("embedding", 3, 64), Format("linear", 16)):
        assert Format.parse("x", form.to_dict()) == form


def test_command_exports_recipes(sources, tmp_path, capsys):
    folder = str(sources(LLAMA)[0])

    assert main(["export", folder, "-o", str(tmp_path / "out"), "--passes", "w4a8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)

    assert "left out of a folder for transformers: quantize-cache" in facts["notes"][0]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight_packed").shape == (97, 16)
    assert generated(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).shape == (1, 11)
    assert main(["export", folder, "-o", str(tmp_path / "no"), "--passes", "w4a8kv4"]) == 1
    assert "the cache 'k0' holds torch.uint8" in capsys.readouterr().err
