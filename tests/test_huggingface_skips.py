"""The skip schema of Hugging Face configs: read, checked and honoured when a folder is loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from torch import nn

import sylvester as sv
from sylvester.compiler import huggingface, huggingface_export
from sylvester.compiler.check import evaluate, relative_error
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface import load_folder
from sylvester.compiler.huggingface_parts import leave_out
from sylvester.compiler.huggingface_skips import read_skips, write_skips
from sylvester.compiler.lockstep import matching_weights
from sylvester.compiler.pipeline import Pipeline
from sylvester.passes.drop_sublayers import DropSublayers
from tests import zoo
from tests.programs import program
from tests.test_huggingface import edit_config, edit_weights, folder_of

SKIP = {"1": {"skip": ["attention", "mlp"]}, "2": {"skip": ["mlp"]}}
DROPPED = DropSublayers(attention=(1,), ffn=(1, 2))


@pytest.fixture
def gpt2(tmp_path):
    return folder_of(zoo.case("gpt2").model, tmp_path)


@pytest.fixture(scope="module")
def whole():
    """The program of the whole model."""
    return sv.trace(zoo.case("gpt2").model, {"input_ids": torch.arange(22).reshape(2, 11)})


def same(first, second):
    a, b = first.run("prefill", *examples(first)), second.run("prefill", *examples(first))
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in a) < 1e-6


def examples(made):
    state = {name: torch.zeros([2, *slot.shape[1:2], 11, *slot.shape[3:]]) for name, slot in made.state.items()}
    return dict(made.main.examples), state


def test_skips_are_read_and_written_back():
    config = {
        "model_type": "x",
        "per_layer_config": {"03": {"skip": ["mlp"], "rank": 2}, "1": {"skip": ["mlp", "attention"]}},
    }

    skips = read_skips(config | {"sylvester_decode_skip": {"ffn": [0, 0]}}, 12)
    written = write_skips(config, {"all": {"ffn": [10]}}, 12)

    assert skips == {"all": {"attention": [1], "ffn": [1, 3]}, "decode": {"ffn": [0]}}
    assert written == {"model_type": "x", "per_layer_config": {"03": {"rank": 2}, "10": {"skip": ["mlp"]}}}
    assert read_skips(write_skips({}, skips, 12), 12) == skips
    assert write_skips(config, {}, 12)["per_layer_config"] == {"3": {"rank": 2}}
    assert read_skips({}, 0) == read_skips({"per_layer_config": {}, "sylvester_decode_skip": {}}, 0) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"per_layer_config": ["attention"]}, "per_layer_config is a list, expected an object"),
        ({"per_layer_config": {"4": {}}}, "per_layer_config names layer 4, the model has layers 0 to 3"),
        ({"per_layer_config": {"-1": {}}}, "names layer '-1', expected a number from 0 to 3"),
        ({"per_layer_config": {"one": {}}}, "names layer 'one', expected a number from 0 to 3"),
        ({"per_layer_config": {"1": {}, "01": {}}}, "names layer 1 twice, the second time as '01'"),
        ({"per_layer_config": {"1": ["mlp"]}}, "of layer 1 is a list, expected an object"),
        ({"per_layer_config": {"1": {"skip": "mlp"}}}, "of layer 1 has skip='mlp', expected a list of names"),
        ({"per_layer_config": {"1": {"skip": [3]}}}, r"of layer 1 has skip=\[3\], expected a list of names"),
        (
            {"per_layer_config": {"1": {"skip": ["moe"]}}},
            r"of layer 1 skips 'moe', expected one of \['attention', 'mlp'\]",
        ),
        ({"sylvester_decode_skip": [1]}, "sylvester_decode_skip holds list, expected lists of layers under"),
        ({"sylvester_decode_skip": {"mlp": [1]}}, r"sylvester_decode_skip holds \['mlp'\], expected"),
        ({"sylvester_decode_skip": {"ffn": 1}}, "has a int for 'ffn', expected a list of layers"),
        ({"sylvester_decode_skip": {"ffn": [True]}}, "names layer True, expected a number from 0 to 3"),
        ({"sylvester_decode_skip": {"ffn": [7]}}, "names layer 7, the model has layers 0 to 3"),
    ],
)
def test_malformed_configs_are_named(config, message):
    with pytest.raises(CompileError, match=message):
        read_skips(config, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_config": {"9": {"skip": ["mlp"]}}}, "per_layer_config names layer 9, the model has layers 0 to 3"),
        (
            {"per_layer_config": {"1": {"n_inner": 32}}},
            "of layer 1 sets 'n_inner', which GPT2LMHeadModel does not act on",
        ),
        ({"per_layer_config": SKIP, "architectures": ...}, "per_layer_config needs the name of the model class"),
    ],
)
def test_folders_with_other_overrides_are_refused(changes, message, gpt2):
    edit_config(gpt2, **changes)

    with pytest.raises(CompileError, match=message):
        load_folder(gpt2)


def test_a_folder_runs_without_the_parts_it_skips(gpt2, whole):
    edit_config(gpt2, per_layer_config=SKIP)
    edit_weights(gpt2, lambda tensors: [tensors.pop(k) for k in list(tensors) if ".h.1." in k or ".h.2.mlp" in k])

    loaded = sv.trace(gpt2)

    assert same(Pipeline((DROPPED,), check=False)(whole), loaded)
    assert loaded.info["notes"] == [
        "left out as the config says (always): attention of layers [1], ffn of layers [1, 2]"
    ]
    assert loaded.info["skipped"] == {"all": {"attention": [1], "ffn": [1, 2]}}
    assert len(loaded.state) == 6
    assert not {"skips", "absent"} & set(loaded.info)
    json.dumps(loaded.info)


def test_weights_of_parts_that_run_are_needed(gpt2):
    edit_config(gpt2, per_layer_config=SKIP)
    edit_weights(
        gpt2, lambda tensors: [tensors.pop(k) for k in list(tensors) if ".h.1." in k or ".h.2.attn.c_proj" in k]
    )

    with pytest.raises(CompileError, match=r"lack 2 tensors that are read, the first is 'transformer.h.2.attn.c_proj"):
        sv.trace(gpt2)


def test_weights_are_needed_where_only_decoding_skips(gpt2):
    edit_config(gpt2, sylvester_decode_skip={"ffn": [1]})
    edit_weights(gpt2, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))

    with pytest.raises(CompileError, match=r"lack 1 tensors, the first is 'transformer.h.1.mlp.c_fc.weight'"):
        sv.trace(gpt2)


def test_no_layer_may_be_left(gpt2):
    edit_config(gpt2, per_layer_config={str(i): {"skip": ["attention", "mlp"]} for i in range(4)})

    with pytest.raises(CompileError, match="all 4 layers would go"):
        sv.trace(gpt2)


def test_layers_must_be_those_of_the_config(whole):
    program = whole.clone()
    program.info |= {"depth": 2, "skips": {"all": {"ffn": [1]}}}

    with pytest.raises(CompileError, match=r"skips parts of 2 layers, 4 are found in the program"):
        leave_out(program, "all")


def test_encoders_leave_parts_out_too(tmp_path, monkeypatch):
    original = sv.trace(folder_of(zoo.case("bert").model, tmp_path / "bert"))
    monkeypatch.setattr(huggingface_export, "trace", lambda model, examples: original.clone())
    skipped = Pipeline((DROPPED,), check=False)(original)

    loaded = sv.trace(skipped.export_hf(tmp_path / "out"))

    a, b = evaluate(skipped), evaluate(loaded)
    assert all(torch.equal(a["forward"][name], b["forward"][name]) for name in a["forward"])
    assert loaded.weights.nbytes == skipped.weights.nbytes


class Nothing(nn.Module):
    """What stands for a part that is left out."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, x, *args, **kwargs):
        return (torch.zeros_like(x), None) if self.pair else torch.zeros_like(x)


class HeterogeneousLMHeadModel(hf.GPT2LMHeadModel):
    """A model class that acts on the schema by itself."""

    def __init__(self, config):
        super().__init__(config)
        for n, block in enumerate(self.transformer.h):
            skip = getattr(config.per_layer_config[n], "skip", [])
            if "attention" in skip:
                block.ln_1, block.attn = nn.Identity(), Nothing(pair=True)
            if "mlp" in skip:
                block.ln_2, block.mlp = nn.Identity(), Nothing(pair=False)


def test_a_class_that_acts_on_the_schema_does_it_itself(gpt2, whole, monkeypatch):
    monkeypatch.setattr(huggingface, "_architecture", lambda transformers, config: HeterogeneousLMHeadModel)
    edit_config(gpt2, per_layer_config=SKIP)
    edit_weights(gpt2, lambda tensors: [tensors.pop(k) for k in list(tensors) if ".h.1." in k or ".h.2.mlp" in k])

    loaded = sv.trace(gpt2)

    assert same(Pipeline((DROPPED,), check=False)(whole), loaded)
    assert loaded.info["notes"] == []
    assert loaded.info["skipped"] == {"all": {"attention": [1], "ffn": [1, 2]}}
    assert loaded.info["layers"] == [0, 2, 3]
    edit_weights(gpt2, lambda tensors: tensors.pop("transformer.h.0.ln_1.weight"))
    with pytest.raises(CompileError, match=r"lack 1 tensors, the first is 'transformer.h.0.ln_1.weight'"):
        sv.trace(gpt2)


def affine(scale=2.0, swap=False):
    """x W^T * scale + b, with another weight where `swap`."""
    torch.manual_seed(0)
    weights = {name: torch.randn(3, 3) for name in ("w", "v")} | {"b": torch.randn(3)}
    return program(
        lambda x, w, v, b: nn.functional.linear(x, v if swap else w) * scale + b + v.sum(),
        torch.ones(2, 3),
        weights=weights,
    )


def test_equal_graphs_pair_their_weights():
    assert matching_weights(affine(), affine()) == {name: name for name in ("w", "v", "b")}


def test_unequal_graphs_name_the_first_difference():
    with pytest.raises(
        CompileError, match=r"mul\(\.\.\., 3\.0\) at .* in 'forward', where the architecture has mul\(\.\.\., 2\.0\)"
    ):
        matching_weights(affine(), affine(3.0))


def test_a_weight_has_one_partner():
    first = affine()
    second = affine(swap=True)

    assert matching_weights(second, second) == {"v": "v", "b": "b"}
    with pytest.raises(CompileError, match=r"weight 'w' at .* where the architecture has weight 'v'"):
        matching_weights(second, first)


def test_other_entries_and_results_do_not_match():
    other = affine()
    other.entries["again"] = other.entries["forward"].clone()

    with pytest.raises(CompileError, match=r"has entries \['again', 'forward'\], the architecture gives \['forward'\]"):
        matching_weights(affine(), other)
    two = program(lambda x: (x, x + 1), torch.ones(2, 3))
    with pytest.raises(CompileError, match=r"'forward' gives \['y0', 'y1'\], the architecture gives \['y0'\]"):
        matching_weights(affine(), two)
