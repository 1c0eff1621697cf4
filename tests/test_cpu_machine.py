"""What passes may ask about this machine: times of steps by kernel, and bytes as an artefact has them."""

from __future__ import annotations

import pytest

from sylvester.backends import cpu_machine
from sylvester.backends.cpu import Cpu
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.target import Target
from sylvester.passes.quantize import Quantize
from sylvester.passes.search_costs import DECODE, alone
from sylvester.passes.search_world import SHORT
from tests.searching import language_model


@pytest.fixture(scope="module")
def model():
    bare = language_model().clone()
    bare.calibration = None
    return Pipeline((Quantize(8, per_layer={"*.2.*": 4}), *SHORT), check=False)(bare)


def machine_for(program):
    return Cpu().machine(program, Target(threads=1))


def test_steps_are_timed_kernel_by_kernel(model, monkeypatch):
    monkeypatch.setattr(cpu_machine, "SETTLING", 0.01)
    program = alone(model)
    step = machine_for(program).steps([program], DECODE, 1000)[0]
    nodes = {node.name for node in program.entries[DECODE].calls()}
    named = [label for labels, _ in step.kernels for label in labels]
    linears = {node.name for node in program.entries[DECODE].calls() if "linear" in str(node.target)}
    assert linears <= set(named)
    assert set(named) <= nodes | {"rms_norm"}
    assert all(seconds >= 0 for _, seconds in step.kernels)
    assert 0 < sum(seconds for _, seconds in step.kernels) < 3 * step.seconds


def test_bytes_are_those_of_the_stored_weights(model):
    found = machine_for(model).footprint(model)
    halved = {key: size for keys, size in found.stored.items() for key in keys if ".2.mlp" in key and "int4" in key}
    assert found.size == sum(found.stored.values()) < language_model().weights.nbytes / 3
    assert halved
    assert found.running > found.size + found.state > found.size
    # One row: 4 layers, keys and values, 2 heads of 16 features, 128 tokens, bfloat16.
    assert found.state == 4 * 2 * 2 * 16 * 128 * 2


def test_another_architecture_cannot_be_timed(model):
    other = "aarch64" if Target().architecture == "x86_64" else "x86_64"
    assert Cpu().machine(model, Target(arch=other)) is None
    assert "threads 3" in Cpu().machine(model, Target(threads=3)).identity()
