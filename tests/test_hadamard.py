"""Hadamard matrices against their definitions in integers, and the op against products with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import sylvester as sv
from sylvester.compiler import hadamard as matrices
from sylvester.compiler import ops

BASES = (1, 12, 20, 28, 36, 44, 52, 60, 76, 100, 108, 140, 148, 344)


def squared(n: int) -> Tensor:
    """H H^T of order n in exact arithmetic."""
    h = matrices.matrix(n).double()
    assert h.abs().unique().tolist() == [1]
    return h @ h.T


def some_rows(n: int, chosen: Tensor) -> Tensor:
    """Rows of H written out from the definition: a row of the base times one of Sylvester's matrix."""
    h = matrices.base_order(n)
    assert h is not None
    part = n // h
    parity = np.bitwise_count(np.arange(part) & (chosen.numpy() % part)[:, None]) % 2
    signs = torch.tensor(1 - 2 * parity.astype(np.int64))
    return torch.einsum("ri,rj->rij", matrices.base(h)[chosen // part].long(), signs).flatten(1)


@pytest.mark.parametrize("h", BASES)
def test_the_fast_transform_is_the_product_with_a_hadamard_matrix(h: int) -> None:
    for k in range(7):
        n = h << k
        chosen = torch.randint(n, (min(n, 48),))
        rows, x = some_rows(n, chosen), torch.randn(3, n)
        fast = matrices.transform(x, n)
        torch.testing.assert_close(fast[:, chosen].double(), x.double() @ rows.T.double() / n**0.5, atol=1e-5, rtol=0)
        torch.testing.assert_close(matrices.transform(fast, n, transposed=True), x, atol=1e-5, rtol=0)
        if n < 800:
            assert torch.equal(squared(n), n * torch.eye(n, dtype=torch.float64))
            assert torch.equal(matrices.matrix(n)[chosen].long(), rows)


@pytest.mark.parametrize("n", [164, 244, 252, 312, 368, 464, 752, 924, 1252, 2188])
def test_larger_bases_are_hadamard_matrices(n: int) -> None:
    assert torch.equal(squared(n), n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("first", range(4, 132, 16))
def test_every_multiple_of_four_has_a_rotation_that_its_transpose_undoes(first: int) -> None:
    for n in range(first, 4097, 128):
        block, x = matrices.largest_block(n), torch.randn(2, n)
        y = matrices.transform(x, block)
        assert n % block == 0
        assert block >= 4
        torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-5, atol=0)
        assert (matrices.transform(y, block, transposed=True) - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("q", [43, 67, 17, 73])
def test_entries_follow_from_quadratic_residues(q: int) -> None:
    def chi(a: int) -> int:
        residue = pow(a, (q - 1) // 2, q)
        return residue - q if residue == q - 1 else residue

    core = torch.tensor([[chi(i - j) for j in range(q)] for i in range(q)])
    s = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1 if q % 4 == 1 else -1, core
    one = torch.eye(q + 1, dtype=torch.int64)
    if q % 4 == 3:
        assert torch.equal(matrices.base(q + 1).long(), s + one)
    else:
        second = torch.kron(s, torch.tensor([[1, 1], [1, -1]])) + torch.kron(one, torch.tensor([[1, -1], [-1, -1]]))
        assert torch.equal(matrices.base(2 * q + 2).long(), second)


@pytest.mark.parametrize("block", [44, 68, 88, 344, 528])
def test_transposes_of_bases_that_are_not_symmetric(block: int) -> None:
    h, x = matrices.matrix(block).double(), torch.randn(2, 3, 2 * block, dtype=torch.float64)
    parts = x.unflatten(-1, (2, block))

    assert not torch.equal(h, h.T)
    torch.testing.assert_close(ops.hadamard(x, block), (parts @ h.T / block**0.5).flatten(-2))
    torch.testing.assert_close(ops.hadamard(x, block, transposed=True), (parts @ h / block**0.5).flatten(-2))


@pytest.mark.parametrize(
    ("n", "base", "block", "scheme"),
    [
        (1, 1, 1, "2^0 (Sylvester)"),
        (64, 1, 64, "2^6 (Sylvester)"),
        (12, 12, 12, "12 (Paley II over GF(5))"),
        (5632, 44, 5632, "44 x 2^7 (Paley I over GF(43))"),
        (11008, 344, 11008, "344 x 2^5 (Paley I over GF(7^3))"),
        (8960, 560, 8960, "20 x 28 x 2^4 (Paley II over GF(3^2), Paley II over GF(13))"),
        (7, None, 1, "7 blocks of 2^0 (Sylvester)"),
        (14, None, 2, "7 blocks of 2^1 (Sylvester)"),
        (172, None, 4, "43 blocks of 2^2 (Sylvester)"),
        (13696, None, 128, "107 blocks of 2^7 (Sylvester)"),
    ],
)
def test_schemes(n: int, base: int | None, block: int, scheme: str) -> None:
    assert (matrices.base_order(n), matrices.largest_block(n), matrices.scheme(n)) == (base, block, scheme)


def test_widths_of_models_need_no_smaller_blocks() -> None:
    widths = [192, 384, 576, 768, 896, 1600, 3584, 4864, 5504, 5632, 8960, 11008, 13824, 14336, 18944, 29568, 57344]

    assert [matrices.largest_block(n) for n in widths] == widths


def test_orders_without_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order 14 is known here, the largest block is 2"):
        matrices.matrix(14)
    with pytest.raises(ValueError, match="24 is not the order of a base, its base_order is 12"):
        matrices.base(24)
    with pytest.raises(ValueError, match="order of at least 1, got 0"):
        matrices.largest_block(0)


@pytest.mark.parametrize("block", [0, -4, 6, 64, 172])
def test_blocks_that_do_not_fit_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"known order that divides 96, got {block}; the largest is 96"):
        ops.hadamard(torch.ones(2, 96), block)


def test_the_public_function_takes_the_largest_block() -> None:
    x = torch.randn(3, 88)

    assert torch.equal(sv.hadamard(x, transposed=True), ops.hadamard(x, 88, True))
    assert torch.equal(sv.hadamard(x, 44), ops.hadamard(x, 44))
    assert torch.equal(sv.hadamard(torch.ones(1, 14)), torch.tensor([[2**0.5, 0.0] * 7]))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_the_other_direction(transposed: bool) -> None:
    x, g = torch.randn(3, 88, dtype=torch.float64, requires_grad=True), torch.randn(3, 88, dtype=torch.float64)
    (ops.hadamard(x, 44, transposed) * g).sum().backward()

    torch.testing.assert_close(x.grad, ops.hadamard(g, 44, not transposed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(2, 96).to(dtype)
    y = matrices.transform(x, 96)

    assert y.dtype == dtype
    exact = matrices.transform(x.double(), 96)
    torch.testing.assert_close(y.double(), exact, atol=8 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_few_matrices_are_kept() -> None:
    for n in (44, 68, 148, 312, 344, 368):
        matrices.base(n)

    assert matrices.paley_signs.cache_info().currsize <= 4
