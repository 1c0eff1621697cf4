"""Programs as Hugging Face folders: what is exported and loaded again computes the same; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sylvester as sv
from sylvester.__main__ import main
from sylvester.compiler import huggingface_export
from sylvester.compiler.check import evaluate, relative_error
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program, binding
from sylvester.compiler.region import rebind
from sylvester.passes import FoldNorms, SplitLinears
from sylvester.passes.drop_sublayers import DropSublayers
from sylvester.passes.skip_layers import SkipLayers
from tests import zoo
from tests.programs import bigram
from tests.test_huggingface import folder_of

RECAPTURED = ("test_skipped_parts_stay_skipped[gpt2]", "test_whole_layers_and_decoding_only_after_loading")
DROP = DropSublayers(attention=(1, 2), ffn=(2,))
PROMPT = torch.tensor([[5, 17, 3, 88]])


SMALL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **WIDE)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, **WIDE, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder and program of an architecture, captured once."""
    made: dict[str, tuple[Path, Program]] = {}

    def source(name):
        if name not in made:
            model = MODELS[name]()
            zoo.randomise(model)
            folder = folder_of(model, tmp_path_factory.mktemp(name))
            made[name] = (folder, sv.trace(folder))
        return made[name]

    return source


@pytest.fixture(autouse=True)
def captured_once(request, sources, monkeypatch):
    """An export captures the architecture again; from the folder of `sources` that gives what was captured there."""
    if request.node.name in RECAPTURED:
        return
    names = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "GPT2LMHeadModel": "gpt2"}
    monkeypatch.setattr(
        huggingface_export, "trace", lambda model, examples: sources(names[type(model).__name__])[1].clone()
    )


@pytest.fixture
def llama(sources):
    return sources("llama")


def passed(program, *steps):
    return Pipeline(steps, check=False).run(program)[0]


def same(first, second):
    """Every output of every entry, to the last bit."""
    a, b = evaluate(first), evaluate(second)
    assert list(a) == list(b)
    for entry in a:
        assert list(a[entry]) == list(b[entry])
        assert all(torch.equal(a[entry][name], b[entry][name]) for name in a[entry])


def continued(program):
    with sv.compile(program, target="reference") as compiled:
        return compiled.generate(PROMPT, max_new_tokens=9)


def read(folder):
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        return config, load_file(folder / "model.safetensors"), file.metadata()


def through_transformers(folder, ids=PROMPT):
    bars = hf.utils.logging
    bars.disable_progress_bar()
    level = bars.get_verbosity()
    bars.set_verbosity_error()
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    bars.set_verbosity(level)
    bars.enable_progress_bar()
    with torch.no_grad():
        return model(ids).logits


def logits(program, ids=PROMPT):
    with sv.compile(program, target="reference") as compiled:
        return compiled(input_ids=ids).logits


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("qwen2", "gpt2"))])
def test_skipped_parts_stay_skipped(name, sources, tmp_path):
    folder, program = sources(name)
    skipped = passed(program, DROP)

    loaded = sv.trace(skipped.export_hf(tmp_path / "out"))
    config, tensors, _ = read(tmp_path / "out")

    same(skipped, loaded)
    assert torch.equal(continued(skipped), continued(loaded))
    assert config["per_layer_config"] == {"1": {"skip": ["attention"]}, "2": {"skip": ["attention", "mlp"]}}
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").per_layer_config[2].skip == ["attention", "mlp"]
    assert list(loaded.state) == ["k0", "v0", "k1", "v1"]
    assert loaded.weights.nbytes == skipped.weights.nbytes
    assert loaded.info["skipped"] == {"all": {"attention": [1, 2], "ffn": [2]}}
    assert not [key for key in tensors if ".2." in key]
    assert set(tensors) < set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_whole_program_is_what_it_came_from(name, sources, tmp_path):
    folder, program = sources(name)

    config, tensors, metadata = read(program.export_hf(tmp_path / "out"))

    original = load_file(folder / "model.safetensors")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[key], original[key]) for key in original)
    assert "per_layer_config" not in config
    assert metadata == {"format": "pt"} | ({"alias:lm_head.weight": "transformer.wte.weight"} if name == "gpt2" else {})
    assert relative_error(through_transformers(folder), through_transformers(tmp_path / "out")) == 0


def test_whole_layers_and_decoding_only_after_loading(sources, tmp_path):
    program = sources("gpt2")[1]
    once = sv.trace(passed(program, SkipLayers(layers=(1,), phase="all")).export_hf(tmp_path / "once"))
    twice = passed(once, DropSublayers(attention=(2,)), SkipLayers(layers=(1,), phase="decode"))

    loaded = sv.trace(twice.export_hf(tmp_path / "twice"))
    config, tensors, _ = read(tmp_path / "twice")

    same(twice, loaded)
    assert torch.equal(continued(twice), continued(loaded))
    assert config["per_layer_config"] == {"1": {"skip": ["attention", "mlp"]}, "3": {"skip": ["attention"]}}
    assert config["sylvester_decode_skip"] == {"attention": [2], "ffn": [2]}
    assert [note for note in loaded.info["notes"] if "(decode): attention of layers [2], ffn of layers [2]" in note]
    assert [key for key in tensors if ".2." in key]


def shared(program, into=2, source=1):
    """Layer `into` reads the weights of layer `source`."""
    made = program.clone()
    for entry in made.entries.values():
        keys = {
            node: key
            for node in entry.placeholders("weight")
            if f".{into}." in (old := binding(node).key) and (key := old.replace(f".{into}.", f".{source}."))
        }
        rebind(entry, made.weights, keys, entry.calls())
    made.sweep()
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shared_tensors_are_stored_once(name, sources, tmp_path):
    program = shared(sources(name)[1])

    program.export_hf(tmp_path / "out")
    _, tensors, metadata = read(tmp_path / "out")

    assert program.weights.nbytes < sources(name)[1].weights.nbytes
    assert not [key for key in tensors if ".2." in key]
    assert all(to.replace(".1.", ".2.") == f"{key[6:]}" for key, to in metadata.items() if ".2." in key)
    assert len([key for key in metadata if ".2." in key]) == len([key for key in tensors if ".1." in key])


def test_shared_tensors_are_shared_when_loaded(sources, tmp_path):
    program = passed(shared(sources("gpt2")[1]), DropSublayers(attention=(2,)))

    loaded = sv.trace(program.export_hf(tmp_path / "out"))

    same(program, loaded)
    assert loaded.weights.nbytes == program.weights.nbytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_stock_folders_compute_the_same_in_transformers(name, sources, tmp_path):
    program = passed(shared(sources(name)[1], into=3, source=0), DROP)

    program.export_hf(tmp_path / "out", stock=True)
    _, tensors, _ = read(tmp_path / "out")

    assert relative_error(logits(program), through_transformers(tmp_path / "out")) < 1e-4
    assert [key for key in tensors if ".3." in key]
    assert read(tmp_path / "out")[0]["per_layer_config"]["1"] == {"skip": ["attention"]}


def test_trained_weights_are_written(sources, tmp_path):
    program = passed(sources("gpt2")[1], DROP)
    for key in list(program.weights):
        if program.weights[key].ndim == 2:
            program.weights[key] = program.weights[key] * 1.5

    same(program, sv.trace(program.export_hf(tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_where_it_holds_every_value(dtype, tmp_path, monkeypatch):
    model = MODELS["gpt2"]().to(dtype)
    program = sv.trace(folder_of(model, tmp_path / "half"))
    monkeypatch.setattr(huggingface_export, "trace", lambda model, examples: program.clone())

    config, tensors, _ = read(passed(program, DROP).export_hf(tmp_path / "out"))
    program.weights["transformer.ln_f.bias"] = program.weights["transformer.ln_f.bias"] + 1e-4
    other, widened, _ = read(program.export_hf(tmp_path / "wide"))

    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert other["dtype"] == "float32"
    assert {t.dtype for t in widened.values()} == {torch.float32}


def test_programs_saved_and_loaded_are_exported(llama, tmp_path):
    passed(llama[1], DROP).save(tmp_path / "program")

    Program.load(tmp_path / "program").export_hf(tmp_path / "out")
    passed(llama[1], DROP).export_hf(tmp_path / "same")

    (config, tensors, _), (expected, others, _) = read(tmp_path / "out"), read(tmp_path / "same")
    assert config == expected
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def test_files_beside_the_weights_are_kept(sources, tmp_path):
    folder, program = sources("llama")
    defaults = json.loads((program.export_hf(tmp_path / "out") / "generation_config.json").read_text())

    assert defaults["eos_token_id"] == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((SplitLinears(),), r"linear.* made by 'split-linears' at .* in 'prefill', where the architecture has slice"),
        ((FoldNorms(),), r"rms_norm.* made by 'fold-norms' at .* in 'prefill', where the architecture has layer_norm"),
    ],
)
def test_what_does_not_fit_is_named(steps, message, sources, tmp_path):
    with pytest.raises(CompileError, match=message) as caught:
        passed(sources("gpt2")[1], *steps).export_hf(tmp_path / "out")

    assert "hint: leave out what made it" in " ".join(caught.value.__notes__)
    assert not (tmp_path / "out").exists()


def test_changed_constants_do_not_fit(llama, tmp_path):
    program = llama[1].clone()
    (key,) = [key for key in program.weights if key.endswith("inv_freq")]
    program.weights[key] = program.weights[key] * 2

    with pytest.raises(CompileError, match="inv_freq' was changed; the architecture computes it"):
        program.export_hf(tmp_path / "out")


def test_weights_of_another_type_do_not_fit(llama, tmp_path):
    program = llama[1].clone()
    program.weights["model.norm.weight"] = program.weights["model.norm.weight"].double()

    with pytest.raises(CompileError, match=r"'model.norm.weight' is torch.float64\[32\], the architecture has"):
        program.export_hf(tmp_path / "out")


def test_skipping_that_is_not_recorded_does_not_fit(llama, tmp_path):
    program = passed(llama[1], DROP)
    del program.info["skipped"]

    with pytest.raises(CompileError, match="does not fit the architecture"):
        program.export_hf(tmp_path / "out")


def test_programs_from_elsewhere_are_refused(tmp_path):
    with pytest.raises(CompileError, match="was not made from a Hugging Face folder"):
        bigram(torch.zeros(5, 5)).export_hf(tmp_path / "out")


def test_other_configs_folders_and_phases_are_refused(llama, tmp_path):
    folder, program = llama
    skipped = passed(program, DropSublayers(ffn=(1,), phase="decode"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")

    with pytest.raises(CompileError, match=r"transformers cannot skip \{'ffn': \[1\]\} in decoding only"):
        skipped.export_hf(tmp_path / "out", stock=True)
    with pytest.raises(CompileError, match="is not empty"):
        program.export_hf(tmp_path / "full")
    other = program.clone()
    other.info["config"]["vocab_size"] = 7
    with pytest.raises(CompileError, match="is not that of the program"):
        other.export_hf(tmp_path / "out")
    other.info["source"] = str(tmp_path / "gone")
    with pytest.raises(CompileError, match=r"there is no config.json in .*gone"):
        other.export_hf(tmp_path / "out")
    assert folder.is_dir()


def test_aliases_of_nothing_are_refused(llama, tmp_path):
    shared(llama[1]).export_hf(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    _, tensors, metadata = read(tmp_path / "out")
    name = next(key for key in metadata if key.startswith("alias:"))
    save_file(tensors, path, metadata=metadata | {name: "model.layers.9.mlp.up_proj.weight"})

    with pytest.raises(CompileError, match=r"is an alias of 'model.layers.9.mlp.up_proj.weight', which the"):
        sv.trace(tmp_path / "out")


def test_command_exports(sources, tmp_path, capsys):
    folder = str(sources("gpt2")[0])
    passes = "drop-sublayers(attention=(1,), ffn=(1, 3))"

    assert main(["export", folder, "-o", str(tmp_path / "out"), "--passes", passes, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)

    assert facts["skipped"] == {"all": {"attention": [1], "ffn": [1, 3]}}
    assert facts["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert read(tmp_path / "out")[0]["per_layer_config"]["3"] == {"skip": ["mlp"]}
    assert main(["export", folder, "-o", str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", folder, "-o", str(tmp_path / "no"), "--passes", "split-linears"]) == 1
    assert "made by 'split-linears'" in capsys.readouterr().err


def test_a_tokenizer_goes_along(llama, tmp_path):
    folder, program = llama
    made = program.clone()
    (tmp_path / "tokenizer.json").write_text("{}")
    made.info["tokenizer"] = str(tmp_path / "tokenizer.json")

    assert (made.export_hf(tmp_path / "out") / "tokenizer.json").read_text() == "{}"
    assert not (folder / "tokenizer.json").exists()
