"""The Hadamard kernel against float64 transforms: many orders, both directions, odd numbers of rows and strides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sylvester as sv
from sylvester.codegen.compile import compile_program
from sylvester.codegen.hadamard import MOST, hadamard, hadamard_header, row_call, row_header
from sylvester.compiler import ops
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.hadamard import transform
from tests.kernel_harness import export, load, run, supported, team
from tests.programs import program

BLOCKS = [1 << n for n in range(16)]
KINDS = {
    "lanes": (12, 24, 40, 72, 84, 96, 44, 352),
    "strips": (192, 576, 768, 20480, 60, 704, 5632),
    "windows": (68, 136, 272, 2176, 148, 296, 2368),
    "fourier": (344, 1376, 11008, 164, 328, 2624),
    "products": (240, 1600, 528, 1232, 7920),
}
"""Orders by how their base is computed."""
ARGUMENTS = "(t, p[0], p[1], i[0], i[1], i[2], i[3], i[4]);"


def source(blocks, header=None):
    """Kernels `h<block>` and, where the transpose differs, `h<block>t`."""
    text = header or ""
    for block, transposed in ((b, t) for b in blocks for t in (False, True)):
        name, kernel = hadamard(block, transposed)
        text += row_header(block, transposed) + (kernel if f"void {name}(" not in text else "")
        text += export(f"h{block}{'t' * transposed}", name + ARGUMENTS)
    return text


def reference(x, block, transposed=False):
    return transform(torch.tensor(np.ascontiguousarray(x), dtype=torch.float64), block, transposed).numpy()


def assert_transformed(y, x, block, transposed=False):
    exact = reference(x, block, transposed)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6 * np.sqrt(block.bit_length()) * np.abs(exact).max())


def check(lib, made, block, transposed, shape):
    rows, k = shape
    rng = np.random.default_rng(block)
    x = rng.standard_normal((rows, k + 5), np.float32)[:, :k]
    wide = np.full((rows, k + 3), 7, np.float32)
    assert run(lib, made, f"h{block}{'t' * transposed}", [rows, k, block, k + 3, k + 5], [wide, x]) == 0
    assert_transformed(wide[:, :k], x, block, transposed)
    assert (wide[:, k:] == 7).all()


@pytest.mark.parametrize("vectors", [4, 8, 16])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_every_power_of_two(isa, vectors):
    lib = load(source(BLOCKS, hadamard_header(vectors)), isa)
    with team(lib, 3) as made:
        for block in BLOCKS:
            check(lib, made, block, False, (5, 3 * block) if block < 4096 else (2, block))
            check(lib, made, block, True, (3, block))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_every_kind_of_base(isa, kind):
    lib = load(source(KINDS[kind]), isa)
    with team(lib, 2) as made:
        for block in KINDS[kind]:
            for transposed in (False, True):
                check(lib, made, block, transposed, (3, 3 * block) if block < 4096 else (1, block))
                check(lib, made, block, transposed, (13, block) if block < 4096 else (2, block))


@pytest.mark.parametrize(
    ("k", "block"), [(768, 256), (2048, 2048), (96, 32), (24, 8), (768, 768), (1056, 352), (40, 20)]
)
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_a_row_in_place_and_back(isa, k, block):
    x = np.random.default_rng(0).standard_normal(k).astype(np.float32)
    text = row_header(block) + row_header(block, transposed=True)
    text += export("row", f"if (t->tid == 0) {{ {row_call('((float *)p[0])', 'i[0]', block)} }}")
    text += export("back", f"if (t->tid == 0) {{ {row_call('((float *)p[0])', 'i[0]', block, True)} }}")
    y, lib = x.copy(), load(text, isa)
    with team(lib, 1) as made:
        assert run(lib, made, "row", [k], [y]) == 0
        assert_transformed(y, x, block)
        assert run(lib, made, "back", [k], [y]) == 0

    np.testing.assert_allclose(y, x, rtol=1e-5, atol=2e-6)


def test_other_vector_counts_are_refused():
    with pytest.raises(ValueError, match="4, 8 or 16"):
        hadamard_header(5)


def test_symmetric_matrices_have_one_kernel():
    assert hadamard(768) == hadamard(768, transposed=True)
    assert hadamard(88)[0] != hadamard(88, transposed=True)[0]


@pytest.mark.parametrize("fused", [True, False])
def test_both_directions_in_one_program(fused):
    def model(x, w):
        a, b = ops.hadamard(x, 44), ops.hadamard(x, 44, transposed=True)
        return (F.linear(a, w), F.linear(b, w)) if fused else (a + x, b + x)

    x, w = torch.randn(3, 88), torch.randn(40, 88) / 9
    with sv.compile(program(model, x, weights={"w": w}), target=sv.Target("cpu", isas=("avx2",))) as compiled:
        found = compiled(x)
    for y, exact in zip(found, model(x.double(), w.double()), strict=True):
        torch.testing.assert_close(y.double(), exact, atol=5e-6, rtol=0)


def test_blocks_above_the_limit_have_no_lowering():
    with pytest.raises(Unsupported, match=f"at most {MOST}"):
        compile_program(program(lambda x: ops.hadamard(x, 2 * MOST), torch.randn(1, 2 * MOST)))
