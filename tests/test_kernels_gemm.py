"""linear and matmul against float64, on shapes with every kind of remainder."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.codegen.linear import linear_text
from sylvester.codegen.matmul import matmul
from sylvester.codegen.panels import pack_f32 as pack
from tests.kernel_harness import export, load, run, strides, supported, team

SOURCE = (
    linear_text().replace("NAME", "plain")
    + matmul("product")
    + export("plain", "plain(t, p[0], NULL, p[1], p[2], p[3], NULL, i[0], i[1], i[2], i[3], NULL, NULL);")
    + export(
        "product",
        "product(t, p[0], p[1], p[2], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9]);",
        "product_scratch(i[3])",
    )
)
SHAPES = [(1, 32, 1), (1, 33, 7), (2, 96, 100), (5, 1, 3), (13, 70, 300), (25, 64, 257), (100, 100, 600)]
SHAPES += [(12, 31, 1000)]
SHAPES += [(rows, 40, 65) for rows in range(1, 15)]


def bound(k: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A float32 dot product is off by at most about k eps sum |a b|; rounding errors grow with the root of k."""
    return 2e-7 * (2 + np.sqrt(k)) * (np.abs(left) @ np.abs(right)) + 1e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_linear(isa, threads):
    rng = np.random.default_rng(0)
    lib = load(SOURCE, isa)
    with team(lib, threads) as made:
        for m, n, k in SHAPES:
            x = rng.standard_normal((m, k + 3), np.float32)
            weight, bias = rng.standard_normal((n, k), np.float32), rng.standard_normal(n, np.float32)
            for offset in (None, bias):
                y = np.full((m, n), np.nan, np.float32)
                assert run(lib, made, "plain", [m, n, k, k + 3], [y, x, pack(weight), offset]) == 0
                left, right = x[:, :k].astype(np.float64), weight.T.astype(np.float64)
                expected = left @ right + (0 if offset is None else offset)
                assert (np.abs(y - expected) <= bound(k, left, right)).all(), (m, n, k)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_matmul_takes_any_strides(isa, threads):
    rng = np.random.default_rng(2)
    lib = load(SOURCE, isa)
    shapes = [(1, 1, 1, 1), (2, 3, 33, 5), (3, 40, 64, 70), (2, 200, 31, 300), (1, 7, 96, 600), (1, 1, 64, 513)]
    with team(lib, threads) as made:
        for (batch, m, n, k), flip_a, flip_b, repeat in [
            (shape, *flips) for shape in shapes for flips in [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 0)]
        ]:
            a = rng.standard_normal((batch, k, m) if flip_a else (batch, m, k), np.float32)
            b = rng.standard_normal((batch, n, k) if flip_b else (batch, k, n), np.float32)
            a, b = (a.swapaxes(1, 2) if flip_a else a), (b.swapaxes(1, 2) if flip_b else b)
            b = np.broadcast_to(b[:1], b.shape) if repeat else b
            y = np.full((batch, m, n), np.nan, np.float32)
            assert run(lib, made, "product", [batch, m, n, k, *strides(a, 3), *strides(b, 3)], [y, a, b]) == 0
            left, right = a.astype(np.float64), b.astype(np.float64)
            assert (np.abs(y - left @ right) <= bound(k, left, right)).all(), (batch, m, n, k, flip_a, flip_b)


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_empty_sizes(isa):
    lib = load(SOURCE, isa)
    bias, nothing = np.arange(5, dtype=np.float32), np.zeros(64, np.float32)
    y = np.full((3, 5), np.nan, np.float32)
    with team(lib, 2) as made:
        assert run(lib, made, "plain", [3, 5, 0, 0], [y, nothing, nothing, bias]) == 0
        np.testing.assert_array_equal(y, np.broadcast_to(bias, (3, 5)))
        assert run(lib, made, "product", [1, 3, 5, 0, 0, 0, 1, 0, 5, 1], [y, nothing, nothing]) == 0
        assert not y.any()
        assert run(lib, made, "plain", [0, 5, 4, 4], [None, None, nothing, None]) == 0
        assert run(lib, made, "product", [0, 3, 5, 2, 6, 2, 1, 10, 5, 1], [None, None, None]) == 0


def test_pack_pads_with_zeros():
    packed = pack(np.arange(33 * 2, dtype=np.float32).reshape(33, 2))

    assert packed.shape == (2, 2, 32)
    assert packed[0, 1, 5] == 11
    assert packed[1, :, 0].tolist() == [64, 65]
    assert not packed[1, :, 1:].any()


def test_pack_refuses_a_vector():
    with pytest.raises(ValueError, match="2 axes"):
        pack(np.zeros(3, np.float32))
