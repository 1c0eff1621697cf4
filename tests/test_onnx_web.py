"""The graphs of the target `onnx` in onnxruntime-web: what they compute in WebAssembly is what the program does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import sylvester as sv
from benchmarks.web.packages import VERSIONS
from sylvester.backends.npm import Package
from sylvester.backends.onnx.names import past_name, present_name
from sylvester.compiler.check import relative_error
from tests import zoo
from tests.web import NODE

PACKAGE = Package(
    "onnxruntime-web",
    VERSIONS["onnxruntime-web"],
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
)
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SCRIPT = Path(__file__).parent / "onnx_web.mjs"
KINDS = ("standard", "ort")
PROMPT = [5, 77, 130, 9, 41, 18]
STEPS = 10
TOLERANCE = 1e-4
pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(not PACKAGE.available(), reason="npm is not installed, and onnxruntime-web comes from there"),
]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    PACKAGE.extract({f"package/dist/{name}": name for name in FILES}, folder)
    return folder


@pytest.fixture
def run(runtime, tmp_path):
    """Compiles for `ops`; what a work of the script finds in the files."""

    def run(program, ops, work, **given):
        with sv.compile(program, target=sv.Target("onnx", options={"ops": ops})) as compiled:
            compiled.save(tmp_path / "artefact")
        caches = [
            {"past": past_name(name), "present": present_name(name), "shape": [1, *map(int, slot.shape[1:])]}
            for name, slot in program.state.items()
        ]
        places = {"runtime": f"{runtime.as_uri()}/", "artefact": f"{(tmp_path / 'artefact').as_uri()}/"}
        asked = json.dumps({**places, "work": work, "caches": caches, **given})
        ran = subprocess.run([NODE, str(SCRIPT)], input=asked, capture_output=True, text=True, check=False, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def logits_of(program, ids):
    """What follows each of the tokens, read together."""
    empty = {name: torch.zeros(1, *map(int, slot.shape[1:])) for name, slot in program.state.items()}
    return program.run("prefill", {"input_ids": torch.tensor([ids])}, empty)["logits"][0]


@pytest.mark.parametrize("ops", KINDS)
@pytest.mark.parametrize(
    ("passes", "tolerance"), [([], TOLERANCE), (["quantize(weights=4, group=32)"], 3e-2)], ids=["float", "int4"]
)
def test_a_language_model_writes_the_tokens_of_the_program(run, ops, passes, tolerance):
    """Rows that meet low-bit weights are rounded otherwise in onnxruntime: their logits are near, not their tokens."""
    program = zoo.traced("llama-tied").rewrite(passes) if passes else zoo.traced("llama-tied").clone()
    found = run(program, ops, "tokens", prompt=PROMPT, steps=STEPS)
    expected = logits_of(program, PROMPT + found["tokens"])[len(PROMPT) - 1 : -1]

    assert relative_error(expected, torch.tensor(found["logits"])) < tolerance
    assert len(set(found["tokens"])) > 2
    if not passes:
        assert found["tokens"] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("ops", KINDS)
def test_an_encoder_computes_what_the_program_does(run, ops):
    program = zoo.traced("bert").clone()
    ids = np.random.default_rng(0).integers(1, zoo.VOCAB, (3, 7))
    mask = np.arange(7) < np.array([[7], [4], [1]])
    found = run(program, ops, "outputs", ids=ids.tolist(), mask=mask.astype(int).tolist())
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
    expected = program.run("forward", inputs)

    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(tensor, torch.tensor(found[name]).reshape(tensor.shape)) < TOLERANCE
