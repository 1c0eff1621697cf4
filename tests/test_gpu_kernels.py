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


def test_functions_of_the_language_itself_in_both_ways():
    summed = Kernel(
        "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef f(x, y, B: tl.constexpr):\n"
        "    i = tl.arange(0, B)\n    tl.store(y, tl.sum(tl.load(x + i), 0) + tl.max(tl.zeros([B], tl.float32), 0))\n",
        "f", {"x": "*fp32", "y": "*fp32"}, {"B": 8},
    )  # fmt: skip
    y = torch.zeros(1)
    for _ in range(2):
        run(summed, (1,), x=torch.arange(8.0), y=y)
        builds(summed, ("sm_90",))
    assert y == 28


CONVERTED = """
import triton
import triton.language as tl


@triton.jit
def converted(x, y, bf16, fp8, B: tl.constexpr):
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    v = tl.load(x + at)
    tl.store(bf16 + at, v.to(tl.bfloat16))
    tl.store(fp8 + at, v.to(tl.float8e4nv).to(tl.float32))
    tl.store(y + at, tl.dot(v.to(tl.bfloat16), tl.trans(v.to(tl.bfloat16))))
"""


def test_interpreted_conversions_round_to_nearest():
    x = torch.randn(16, 16) * torch.logspace(-4, 3, 16)
    y, bf16, fp8 = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    types = {"x": "*fp32", "y": "*fp32", "bf16": "*bf16", "fp8": "*fp32"}
    run(Kernel(CONVERTED, "converted", types, {"B": 16}), (1,), x=x, y=y, bf16=bf16, fp8=fp8)
    assert torch.equal(bf16, x.bfloat16())
    assert torch.equal(fp8, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    torch.testing.assert_close(y, bf16.float() @ bf16.float().T)
