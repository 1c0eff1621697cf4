"""The Walsh-Hadamard kernel against a float64 matrix product, for every block size and odd numbers of blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylvester.codegen.compile import compile_program
from sylvester.codegen.hadamard import MOST, hadamard, hadamard_header
from sylvester.compiler import ops
from sylvester.compiler.errors import Unsupported
from tests.kernel_harness import export, load, run, supported, team
from tests.programs import program

BLOCKS = [1 << n for n in range(MOST.bit_length())]
BODY = hadamard() + export("transform", "sv_hadamard(t, p[0], p[1], i[0], i[1], i[2], i[3], i[4]);")
BODY += export("row", "if (t->tid == 0) sv_hadamard_row(p[0], i[0], i[1]);")
SOURCE = hadamard_header() + BODY


def sylvester(order):
    """H of 2^order, normalised."""
    h = np.ones((1, 1))
    for _ in range(order):
        h = np.block([[h, h], [h, -h]])
    return h * 2 ** (-order / 2)


def reference(x, block):
    """Kronecker factors of at most 1024, so that the matrices stay small."""
    y = x.astype(np.float64).reshape(-1, block)
    order = block.bit_length() - 1
    high = order // 2
    y = y.reshape(-1, 1 << high, block >> high)
    return (sylvester(high) @ y @ sylvester(order - high)).reshape(x.shape)


def assert_transformed(y, x, block):
    exact = reference(x, block)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6 * np.sqrt(block.bit_length()) * np.abs(exact).max())


def test_reference_is_the_sylvester_matrix():
    x = np.random.default_rng(0).standard_normal((3, 64))

    np.testing.assert_allclose(reference(x, 64), x @ sylvester(6), atol=1e-12)
    assert sylvester(1).tolist() == [[2**-0.5, 2**-0.5], [2**-0.5, -(2**-0.5)]]


@pytest.mark.parametrize("vectors", [4, 8, 16])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_every_block_size(isa, vectors):
    rng = np.random.default_rng(0)
    lib = load(hadamard_header(vectors) + BODY, isa)
    with team(lib, 3) as made:
        for block in BLOCKS:
            rows, k = (5, 3 * block) if block < 4096 else (2, block)
            x = rng.standard_normal((rows, k + 5), np.float32)[:, :k]
            wide = np.full((rows, k + 3), 7, np.float32)
            sizes = [rows, k, block, k + 3, k + 5]
            assert run(lib, made, "transform", sizes, [wide, x]) == 0
            assert_transformed(wide[:, :k], x, block)
            assert (wide[:, k:] == 7).all()


@pytest.mark.parametrize(("k", "block"), [(768, 256), (2048, 2048), (384, 128), (96, 32), (24, 8)])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_a_row_in_place_and_back(isa, k, block):
    x = np.random.default_rng(0).standard_normal(k).astype(np.float32)
    y, lib = x.copy(), load(SOURCE, isa)
    with team(lib, 1) as made:
        assert run(lib, made, "row", [k, block], [y]) == 0
        assert_transformed(y, x, block)
        assert run(lib, made, "row", [k, block], [y]) == 0

    np.testing.assert_allclose(y, x, rtol=1e-5, atol=2e-6)


def test_other_vector_counts_are_refused():
    with pytest.raises(ValueError, match="4, 8 or 16"):
        hadamard_header(5)


@pytest.mark.parametrize("block", [0, -4, 12, 64])
def test_blocks_that_do_not_fit_are_refused(block):
    with pytest.raises(ValueError, match=f"power of two and divides 96, got {block}"):
        ops.hadamard(torch.ones(2, 96), block)


def test_the_op_is_its_own_inverse_and_the_matrix():
    x = torch.randn(3, 96, dtype=torch.float64)

    np.testing.assert_allclose(ops.hadamard(x, 32).numpy(), reference(x.numpy(), 32), atol=1e-12)
    torch.testing.assert_close(ops.hadamard(ops.hadamard(x, 32), 32), x)


def test_blocks_above_the_limit_have_no_lowering():
    with pytest.raises(Unsupported, match=f"at most {MOST}"):
        compile_program(program(lambda x: ops.hadamard(x, 2 * MOST), torch.randn(1, 2 * MOST)))
