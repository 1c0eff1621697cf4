"""Every model of the zoo through the whole compiler: all targets agree with float64, also after save and load."""

from __future__ import annotations

import copy

import pytest
import torch

import sylvester as sv
from tests import zoo

TOLERANCE = 1e-4
ONNX = [sv.Target("onnx", options={"ops": ops}) for ops in ("standard", "ort")]


def exact(case, inputs):
    with torch.no_grad():
        return [t for t in zoo.tensors(copy.deepcopy(case.model).double()(**zoo.to_double(inputs)))]


def found(compiled, inputs):
    result = compiled(**inputs)
    return list(result.values()) if isinstance(result, dict) else zoo.tensors(result)


def relative_error(found, expected):
    assert [t.shape for t in found] == [t.shape for t in expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_targets_agree_with_float64(name, tmp_path):
    case = zoo.case(name)
    program = zoo.traced(name).clone()
    assert ("decode" in program.entries) == case.causal_lm
    wanted = [(inputs, exact(case, inputs)) for inputs in (case.inputs, *case.other)]

    for target in ("reference", *ONNX):
        with sv.compile(program, target=target) as compiled:
            for inputs, expected in wanted:
                assert relative_error(found(compiled, inputs), expected) <= TOLERANCE
    with sv.compile(program, target=sv.Target("cpu", isas=("avx2",))) as compiled:
        for inputs, expected in wanted:
            assert relative_error(found(compiled, inputs), expected) <= TOLERANCE
        compiled.save(tmp_path / "artefact")
    with sv.load(tmp_path / "artefact") as again:
        inputs, expected = wanted[-1]
        assert relative_error(found(again, inputs), expected) <= TOLERANCE


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_cached_decoding_repeats_the_full_forward(name):
    """Greedy tokens from prefill and decode are those of running the whole sequence anew each time."""
    case = zoo.case(name)
    (ids,) = (tensor[:1] for tensor in case.inputs.values())
    produced = []
    for target in (sv.Target("cpu", isas=("avx2",)), *ONNX):
        with sv.compile(zoo.traced(name).clone(), target=target) as compiled:
            produced.append(compiled.generate(ids.numpy(), max_new_tokens=12, stop=())[0].tolist()[-12:])

    model = copy.deepcopy(case.model).double()
    sequence = ids
    with torch.no_grad():
        for _ in range(12):
            logits = zoo.tensors(model(sequence))[0]
            sequence = torch.cat((sequence, logits[:, -1:].argmax(-1)), 1)
    assert produced == [sequence[0, -12:].tolist()] * 3
