"""Every model of the zoo through the whole compiler: all targets agree with float64, also after save and load."""

from __future__ import annotations

import copy

import pytest
import torch

import sylvester as sv
from tests import zoo
from tests.nightly import by_night

DAILY = (
    *("llama-gqa", "mistral", "gemma", "phi", "gpt2", "opt", "bert", "vit", "whisper-encoder", "t5", "torch-decoder"),
    *("odd-names", "resnet", "mobilenet", "mlp"),
)

TOLERANCE = 1e-4
ONNX = ("standard", "ort")


def exact(case, inputs):
    with torch.no_grad():
        return [t for t in zoo.tensors(copy.deepcopy(case.model).double()(**zoo.to_double(inputs)))]


def found(compiled, inputs):
    result = compiled(**inputs)
    return list(result.values()) if isinstance(result, dict) else zoo.tensors(result)


def relative_error(found, expected):
    assert [t.shape for t in found] == [t.shape for t in expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", by_night(zoo.NAMES, DAILY))
def test_reference_and_cpu_agree_with_float64(name, tmp_path):
    case = zoo.case(name)
    program = zoo.traced(name).clone()
    assert ("decode" in program.entries) == case.causal_lm
    wanted = [(inputs, exact(case, inputs)) for inputs in (case.inputs, *case.other)]

    with sv.compile(program, target="reference") as reference:
        for inputs, expected in wanted:
            assert relative_error(found(reference, inputs), expected) <= TOLERANCE
    with sv.compile(program, target=sv.Target("cpu", isas=("avx2",))) as compiled:
        for inputs, expected in wanted:
            assert relative_error(found(compiled, inputs), expected) <= TOLERANCE
        compiled.save(tmp_path / "artefact")
    with sv.load(tmp_path / "artefact") as again:
        inputs, expected = wanted[-1]
        assert relative_error(found(again, inputs), expected) <= TOLERANCE


def each_kind(names):
    """Both kinds of ops for every model; without nightly tests one of them, in turns."""
    return [
        pytest.param(name, kind, marks=() if ONNX[index % 2] == kind else pytest.mark.nightly)
        for index, name in enumerate(names)
        for kind in ONNX
    ]


@pytest.mark.parametrize(("name", "kind"), each_kind(zoo.NAMES))
def test_onnxruntime_agrees_with_float64(name, kind):
    case = zoo.case(name)
    with sv.compile(zoo.traced(name).clone(), target=sv.Target("onnx", options={"ops": kind})) as compiled:
        for inputs in (case.inputs, *case.other):
            assert relative_error(found(compiled, inputs), exact(case, inputs)) <= TOLERANCE
        if case.causal_lm:
            assert greedy(compiled, case) == uncached(case)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_cached_decoding_repeats_the_full_forward(name):
    """Greedy tokens from prefill and decode are those of running the whole sequence anew each time."""
    case = zoo.case(name)
    with sv.compile(zoo.traced(name).clone(), target=sv.Target("cpu", isas=("avx2",))) as compiled:
        assert greedy(compiled, case) == uncached(case)


def greedy(compiled, case):
    (ids,) = (tensor[:1] for tensor in case.inputs.values())
    return compiled.generate(ids.numpy(), max_new_tokens=12, stop=())[0].tolist()[-12:]


def uncached(case):
    (sequence,) = (tensor[:1] for tensor in case.inputs.values())
    model = copy.deepcopy(case.model).double()
    with torch.no_grad():
        for _ in range(12):
            logits = zoo.tensors(model(sequence))[0]
            sequence = torch.cat((sequence, logits[:, -1:].argmax(-1)), 1)
    return sequence[0, -12:].tolist()
