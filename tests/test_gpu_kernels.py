"""How Triton texts become modules and cubins."""

from __future__ import annotations

import pytest
import torch

from sylvester.backends.cuda.compile import build
from sylvester.codegen.gpu_kernel import Kernel, text
from sylvester.compiler.errors import CompileError
from tests.gpu import builds, run

MAPPED = (
    text("pointwise")
    + '''

@triton.jit
def mapped(x, y, n, BLOCK: tl.constexpr):
    """y = gelu(tanh(x)) silu(x)"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < n).to(tl.float32)
    tl.store(y + i, gelu_tanh(tanh(v)) * silu(v) + gelu(v), i < n)
'''
)
KERNEL = Kernel(MAPPED, "mapped", {"x": "*bf16", "y": "*fp32", "n": "i32"}, {"BLOCK": 64}, aligned=("x", "y"))


def test_functions_of_single_numbers():
    x = torch.cat([torch.randn(99) * 4, torch.tensor([0.0, 90.0, -90.0])]).bfloat16()
    y = torch.empty(102)
    run(KERNEL, (2,), x=x, y=y, n=102)
    wide = x.double()
    gelu = torch.nn.functional.gelu
    expected = gelu(wide.tanh(), approximate="tanh") * torch.nn.functional.silu(wide) + gelu(wide)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_machine_code_for_every_architecture():
    builds(KERNEL)


def test_an_architecture_that_is_not_built_for():
    with pytest.raises(CompileError, match="'sm_70', expected one of"):
        build(KERNEL, "sm_70")


def test_what_triton_refuses_is_said():
    wrong = Kernel(KERNEL.text, "mapped", KERNEL.types, {"BLOCK": 48})
    with pytest.raises(CompileError, match="mapped for sm_90"):
        build(wrong, "sm_90")


def test_text_has_what_it_imports_once():
    assert text("pointwise").count("def tanh(") == 1
