"""Every norm, rotation and attention of the zoo is raised; the outputs stay those of eager PyTorch at other sizes."""

from __future__ import annotations

import copy

import pytest
import torch

from sylvester.compiler.check import relative_error
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.trace import capture
from sylvester.passes.canonicalize import Canonicalize
from sylvester.passes.raise_attention import RaiseAttention
from sylvester.passes.raise_glu import RaiseGlu
from sylvester.passes.raise_norms import RaiseNorms
from sylvester.passes.raise_rope import RaiseRope
from tests import zoo
from tests.nightly import by_night

RAISE = Pipeline((Canonicalize(), RaiseNorms(), RaiseRope(), RaiseGlu(), RaiseAttention(), Canonicalize()))
WRITTEN_OUT = ("rsqrt", "sqrt", "softmax", "scaled_dot_product_attention")
ROTARY = ("llama-gqa", "mistral", "qwen3", "gemma", "phi", "gpt-neox", "odd-names")
CAUSAL = {"llama-gqa": (True, 0), "mistral": (True, 8), "gpt2": (True, 0), "opt": (True, 0), "bert": (False, 0)}
DAILY = ("llama-gqa", "mistral", "phi", "gpt2", "bert", "t5", "vit", "odd-names", "resnet")
EAGER = ("llama-gqa", "mistral", "gpt2", "bert", "t5")


def left(program: Program) -> set[str]:
    """Ops that a norm, an attention or a rotation is written in."""
    names = {str(node.target).split(".")[1] for node in program.main.calls()}
    return names & set(WRITTEN_OUT)


def flags(program: Program) -> set[tuple[object, ...]]:
    """(causal, window) of the attentions."""
    return {node.args[6:] for node in program.main.calls(torch.ops.sylvester.attention.default)}


def worst(before: Program, after: Program, case: zoo.Case) -> float:
    runs = ((before.run("forward", x), after.run("forward", x)) for x in case.other)
    return max(relative_error(old[name], new[name]) for old, new in runs for name in old)


@pytest.mark.parametrize("name", by_night(zoo.NAMES, DAILY))
def test_everything_is_raised(name: str) -> None:
    case = zoo.case(name)
    before = capture(case.model, dict(case.inputs))

    after = RAISE(before)

    assert left(after) == set()
    assert worst(before, after, case) < 1e-5
    if name in ROTARY:
        assert len(after.main.calls(torch.ops.sylvester.rope.default)) == 8
    if name in CAUSAL:
        assert flags(after) == {CAUSAL[name]}


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_attention_written_out_and_half_precision(name: str, dtype: torch.dtype) -> None:
    case = zoo.case(name)
    model = copy.deepcopy(case.model).to(dtype)
    model.set_attn_implementation("eager")

    after = RAISE(capture(model, dict(case.inputs)))

    assert left(after) == set()
    assert flags(after) <= {CAUSAL.get(name, (True, 0)), (False, 0)}
