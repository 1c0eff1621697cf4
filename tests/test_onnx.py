"""The target `onnx`: what its files hold, how caches and branches run, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

import sylvester as sv
from sylvester.__main__ import main
from sylvester.backends.onnx import parity
from sylvester.backends.onnx.builder import TRANSLATIONS
from sylvester.backends.onnx.weights import FILE
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, ContractBroken, Unsupported
from tests import zoo
from tests.programs import program

ops = torch.ops.sylvester
SHIPPED = Path(__file__).parent.parent / "examples" / "models" / "novels-7m"
KINDS = ("standard", "ort")


def target(**options):
    return sv.Target("onnx", options=options)


@pytest.fixture(scope="module", params=KINDS)
def lm(request, tmp_path_factory):
    """The folder of a language model with tied weights."""
    folder = tmp_path_factory.mktemp("onnx") / request.param
    with sv.compile(zoo.traced("llama-tied").clone(), target=target(ops=request.param)) as compiled:
        compiled.save(folder)
    return folder


def graph_of(folder, entry):
    return onnx.load(folder / f"{entry}.onnx", load_external_data=False)


def result(made, **inputs):
    return next(iter(made.run("forward", inputs).values()))


def kinds(model):
    return {node.op_type for node in model.graph.node}


def test_weights_lie_in_one_file_once(lm):
    stored = sum(t.numel() * t.element_size() for t in dict(zoo.traced("llama-tied").weights).values())

    places = {
        (d.value, {e.key: e.value for e in tensor.external_data}["offset"])
        for entry in ("prefill", "decode")
        for tensor in graph_of(lm, entry).graph.initializer
        for d in tensor.external_data
        if d.key == "location"
    }

    assert {name for name, _ in places} == {FILE}
    assert stored * 0.98 <= (lm / FILE).stat().st_size <= stored * 1.02 + 4096
    assert {p.name for p in lm.glob("*.onnx")} == {"start.onnx", "prefill.onnx", "decode.onnx"}


def test_graphs_say_where_they_come_from(lm):
    props = {p.key: p.value for p in graph_of(lm, "decode").metadata_props}

    assert props["sylvester.version"] == sv.__version__
    assert props["sylvester.entry"] == "decode"
    assert "derive-decode" in json.loads(props["sylvester.passes"])
    assert len(props["sylvester.weights.sha256"]) == 64


def test_caches_have_the_names_of_other_libraries(lm):
    graph = graph_of(lm, "decode").graph

    assert {"input_ids", "past", "past_key_values.0.key", "past_key_values.3.value"} <= {i.name for i in graph.input}
    assert {"logits", "present.0.key", "present.3.value"} <= {o.name for o in graph.output}


def test_standard_graphs_have_standard_ops_only(lm):
    found = {n.domain for entry in ("prefill", "decode") for n in graph_of(lm, entry).graph.node}
    names = kinds(graph_of(lm, "decode"))

    if lm.name == "standard":
        assert found == {""}
        assert {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"} <= names
    else:
        assert {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"} <= names
        assert not {"RotaryEmbedding", "TensorScatter"} & names


@pytest.mark.parametrize("lm", ["ort"], indirect=True)
def test_norms_of_sums_make_only_what_is_read(lm):
    """Of norm, mean, deviation and sum, the two in the middle."""
    nodes = [n for n in graph_of(lm, "decode").graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]

    assert {tuple(bool(name) for name in n.output) for n in nodes} == {(True, False, False, True)}


@pytest.mark.parametrize("lm", ["ort"], indirect=True)
@pytest.mark.parametrize(("entry", "sums"), [("decode", 1), ("prefill", 0)])
def test_positions_are_counted_once_for_all_layers(lm, entry, sums):
    graph = graph_of(lm, entry).graph
    counts = Counter(n.op_type for n in graph.node)
    lengths = {tuple(n.input[5:7]) for n in graph.node if n.op_type == "GroupQueryAttention"}
    few = {"Shape": 2, "Cast": 1, "Sub": 1, "Expand": 1, "Add": sums, "Squeeze": 0, "Unsqueeze": 0}

    assert counts["GroupQueryAttention"] > len(lengths) == 1
    assert {op: counts[op] for op in few} == few


def test_batches_read_prompts_in_parts(lm):
    """Several tokens of several rows meet caches that hold some."""
    prompt = np.random.default_rng(0).integers(3, zoo.VOCAB, (3, 9))
    with sv.load(lm) as compiled:
        whole = compiled.generate(prompt, max_new_tokens=6, stop=(), chunk=0)
        parts = compiled.generate(prompt, max_new_tokens=6, stop=(), chunk=4, reuse=False)

    assert whole.tolist() == parts.tolist()


@pytest.mark.parametrize("opset", [18, 22, 23])
def test_older_opsets_write_ops_out(opset):
    case = zoo.case("llama-gqa")
    with torch.no_grad():
        (expected,) = zoo.tensors(case.model(**case.inputs))
    with sv.compile(zoo.traced("llama-gqa").clone(), target=target(opset=opset)) as compiled:
        names, found = kinds(graph_of(compiled.report_html.parent, "decode")), compiled(**case.inputs)
        tokens = compiled.generate(case.inputs["input_ids"][:1], max_new_tokens=5, stop=())

    assert ("Attention" in names, "RotaryEmbedding" in names) == (opset >= 23, opset >= 23)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    assert tokens.shape[1] == case.inputs["input_ids"].shape[1] + 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", ["quantize(weights=4, group=32)", "quantize(weights=8)", "quantize(weights=16)"])
def test_weights_of_few_bits_are_those_of_the_program(kind, passes):
    """Logits differ from the program's by what rounding rows otherwise costs, not by the weights."""
    rewritten = zoo.traced("llama-tied").rewrite([passes])
    ids = zoo.case("llama-tied").inputs["input_ids"]
    expected = rewritten.run("prefill", {"input_ids": ids}, _empty(rewritten, len(ids)))["logits"]
    with sv.compile(rewritten, target=target(ops=kind)) as compiled:
        found = compiled(input_ids=ids)
        size = (compiled.report_html.parent / FILE).stat().st_size

    error = (found["logits"] - expected).norm() / expected.norm()
    assert error < (0.01 if "16" in passes else 0.03)
    assert size <= rewritten.weights.nbytes * 1.1 + 8192


def _empty(rewritten, batch):
    shapes = {name: (batch, *slot.shape[1:]) for name, slot in rewritten.state.items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _skipping(x, left, weight):
    return ops.add_unless(x, F.silu(F.linear(x, weight)), left)


def test_parts_that_no_token_needs_are_not_run():
    x, left = torch.randn(2, 3, 8), torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    made = program(_skipping, x, left, weights={"w": torch.randn(8, 8)})
    with sv.compile(made, target="onnx") as compiled:
        graph = graph_of(compiled.report_html.parent, "forward")
        found = [compiled(x, n) for n in (left, torch.ones(2, 3), torch.zeros(2, 3))]

    (branch,) = [n for n in graph.graph.node if n.op_type == "If"]
    assert "MatMul" in {n.op_type for a in branch.attribute for n in a.g.node}
    assert "MatMul" not in kinds(graph)
    for given, y in zip((left, torch.ones(2, 3), torch.zeros(2, 3)), found, strict=True):
        torch.testing.assert_close(y, result(made, x0=x, x1=given))


def test_report_says_how_far_graphs_are_off():
    with sv.compile(zoo.traced("mlp").clone(), target="onnx") as compiled:
        outputs = compiled.report["parity"]["outputs"]

    assert {o["data"] for o in outputs} == {"example", "random"}
    assert all(0 <= o["error"] <= 1e-5 < o["tolerance"] == parity.TOLERANCE["float32"] for o in outputs)


def test_first_node_that_differs_is_named(monkeypatch):
    right = TRANSLATIONS[torch.ops.aten.sigmoid.default]
    wrong = {
        torch.ops.aten.sigmoid.default: lambda b, fact, x: b.call("Add", right(b, fact, x), b.number(0.5, x.dtype))
    }
    monkeypatch.setattr("sylvester.backends.onnx.translate.TRANSLATIONS", TRANSLATIONS | wrong)
    made = program(lambda x: torch.tanh(torch.sigmoid(torch.exp(x)) * 2).sum(-1), torch.randn(4, 5))

    with pytest.raises(ContractBroken, match="the first node that differs is sigmoid"):
        sv.compile(made, target="onnx")


def test_parity_is_left_out_when_checks_are_off(monkeypatch):
    monkeypatch.setenv(knobs.CHECK.name, "0")
    with sv.compile(zoo.traced("mlp").clone(), target="onnx") as compiled:
        assert "parity was not measured" in compiled.ledger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 is too old, expected a number from 18 to 24"),
        ({"opset": 99}, "opset 99 is unknown"),
        ({"ops": "cuda"}, "ops is 'cuda', expected one of"),
        ({"opsets": 23}, "the target 'onnx' has no option 'opsets'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(CompileError, match=message):
        sv.compile(zoo.traced("mlp").clone(), target=target(**options))


def test_other_targets_take_no_options():
    with pytest.raises(CompileError, match="the target 'reference' has no option 'opset'"):
        sv.compile(zoo.traced("mlp").clone(), target=sv.Target("reference", options={"opset": 23}))


def test_low_bits_need_an_opset_that_has_them():
    rewritten = zoo.traced("llama-tied").rewrite(["quantize(weights=4, group=32)"])
    with pytest.raises(Unsupported, match="needs opset 21 or above, found opset 20"):
        sv.compile(rewritten, target=target(opset=20))


def test_graph_over_two_gigabytes_is_refused(monkeypatch):
    monkeypatch.setattr("sylvester.backends.onnx.backend.GRAPH_LIMIT", 1000)
    with pytest.raises(Unsupported, match=r"the graph forward.onnx takes .* GB without its weights"):
        sv.compile(zoo.traced("mlp").clone(), target="onnx")


def test_weights_over_two_gigabytes_are_noted(monkeypatch):
    monkeypatch.setattr("sylvester.backends.onnx.backend.LIMIT_32_BIT", 1000)
    with sv.compile(zoo.traced("mlp").clone(), target="onnx") as compiled:
        assert "32-bit WebAssembly cannot load them" in compiled.ledger


def test_hadamard_blocks():
    x = torch.randn(3, 5, 1536)
    for block in (8, 128, 256, 512, 768):
        made = program(lambda x, block=block: ops.hadamard(x, block), x)
        with sv.compile(made, target="onnx") as compiled:
            torch.testing.assert_close(compiled(x), result(made, x0=x), rtol=1e-4, atol=1e-5)


def test_commands(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "small_mlp.py").write_text(
        "import torch\n\ndef build():\n    return torch.nn.Linear(4, 5).eval(), (torch.ones(3, 4),)\n"
    )
    monkeypatch.syspath_prepend(folder)
    command = ["compile", "small_mlp:build", "--target", "onnx", "-o", str(tmp_path / "a"), "--json"]

    assert main([*command, "--option", "opset=21", "--option", "ops=ort"]) == 0
    assert main(["export", "small_mlp:build", "--format", "onnx", "-o", str(tmp_path / "b"), "--json"]) == 0
    assert main([*command, "--option", "opset"]) == 1

    opsets = [{o.domain: o.version for o in graph_of(tmp_path / n, "forward").opset_import}[""] for n in "ab"]
    assert opsets == [21, 24]
    assert "expected name=value" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(KINDS[0], marks=pytest.mark.nightly), KINDS[1]])
def test_shipped_model_writes_the_tokens_that_the_program_chooses(kind):
    """Each of 200 greedy tokens is the likeliest one after those before it."""
    made = sv.trace(SHIPPED)
    with sv.compile(made, target=target(ops=kind)) as compiled:
        ids = compiled.generate(np.array([compiled.encode("It was a dark night, and")]), max_new_tokens=200, stop=())

    logits = made.run("prefill", {"input_ids": torch.from_numpy(ids)}, _empty(made, 1))["logits"]
    assert logits[0, -201:-1].argmax(-1).tolist() == ids[0, -200:].tolist()
