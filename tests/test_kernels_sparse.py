"""Kernels that skip weights where a value is zero, and dense layers over the same weights, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.codegen.compile import compile_program
from sylvester.codegen.conv2d import Finish
from sylvester.codegen.layout import Format
from sylvester.codegen.linear import linear_text
from sylvester.codegen.sparse import PARTS, pack_columns, padded, sparse_glu, sparse_linear, strided_header
from sylvester.compiler.ops import OPS
from tests.kernel_harness import export, load, run, supported, team
from tests.programs import program

SOURCE = (
    strided_header()
    + linear_text(Format("rows")).replace("NAME", "by_rows")
    + linear_text(Format("columns")).replace("NAME", "by_columns")
    + sparse_glu("glu", "silu")
    + sparse_linear("skipping")
    + sparse_linear("adding", Finish("y[j] + p0[j]", 1))
    + export("by_rows", "by_rows(t, p[0], NULL, p[1], p[2], p[3], NULL, i[0], i[1], i[2], i[3], NULL, NULL);")
    + export("by_columns", "by_columns(t, p[0], NULL, p[1], p[2], p[3], NULL, i[0], i[1], i[2], i[3], NULL, NULL);")
    + export("glu", "glu(t, p[0], p[1], p[2], p[3], p[4], p[5], i[0], i[1], i[2], i[3], i[4]);")
    + export("skipping", "skipping(t, p[0], p[1], p[2], p[3], p[4], i[0], i[1], i[2], i[3]);", "skipping_scratch(i[2])")
    + export("adding", "adding(t, p[0], p[1], p[2], p[3], p[4], i[0], i[1], i[2], i[3], p[5]);", "adding_scratch(i[2])")
)
SHAPES = [(1, 32, 1), (1, 33, 7), (1, 200, 515), (2, 96, 100), (3, 70, 33), (4, 257, 40), (5, 31, 290), (26, 65, 17)]
SHAPES += [(1, 5, 3000), (13, 129, 300)]
PER_TEAM = pytest.mark.parametrize("threads", [1, 2, 3, 2 * PARTS + 1])
PER_ISA = pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)


def thinned(rng: np.random.Generator, m: int, k: int, kept: float) -> np.ndarray:
    """Rows of normal values of which a part is kept, within longer rows that must not be read."""
    x = rng.standard_normal((m, k + 3), np.float32)
    x[:, :k][rng.random((m, k)) >= kept] = 0
    x[:, k:] = np.nan
    return x


def bound(k: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return 2e-7 * (2 + np.sqrt(k)) * (np.abs(left) @ np.abs(right)) + 1e-6


@PER_TEAM
@PER_ISA
def test_a_layer_over_zeros_is_the_dense_layer(isa, threads):
    rng, lib = np.random.default_rng(0), load(SOURCE, isa)
    with team(lib, threads) as made:
        for (m, n, k), kept in [(s, kept) for s in SHAPES for kept in (0.0, 0.4, 1.0)]:
            x, weight = thinned(rng, m, k, kept), rng.standard_normal((n, k), np.float32)
            bias, more = rng.standard_normal(n, np.float32), rng.standard_normal((m, n), np.float32)
            sums = np.full((PARTS, 4, padded(n)), np.nan, np.float32)
            left, right = x[:, :k].astype(np.float64), weight.T.astype(np.float64)
            for name, offset, rest in (("skipping", None, 0), ("skipping", bias, 0), ("adding", bias, more)):
                y = np.full((m, n), np.nan, np.float32)
                given = [y, x, pack_columns(weight), offset, sums, more]
                assert run(lib, made, name, [m, n, k, k + 3], given) == 0
                expected = left @ right + (0 if offset is None else offset) + rest
                assert (np.abs(y - expected) <= bound(k, left, right)).all(), (m, n, k, kept)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@PER_TEAM
@PER_ISA
def test_a_gated_layer_is_the_dense_one_with_zeros(isa, threads):
    rng, lib = np.random.default_rng(1), load(SOURCE, isa)
    with team(lib, threads) as made:
        for (m, n, k), level in [(s, level) for s in SHAPES for level in (-1.0, 0.1, 9.0)]:
            x, gate = thinned(rng, m, k, 1.0), thinned(rng, m, n, 1.0)
            weight, bias = rng.standard_normal((n, k), np.float32), rng.standard_normal(n, np.float32)
            thresholds = np.float32(level) * rng.random(n, np.float32)
            left, right, opened = x[:, :k].astype(np.float64), weight.T.astype(np.float64), silu(gate[:, :n])
            for offset in (None, bias):
                y = np.full((m, n), np.nan, np.float32)
                assert run(lib, made, "glu", [m, n, k, k + 3, n + 3], [y, x, weight, offset, gate, thresholds]) == 0
                kept = opened * (left @ right + (0 if offset is None else offset))
                expected = np.where(np.abs(opened) <= thresholds, 0, kept)
                allowed = np.abs(opened) * bound(k, left, right) + 1e-6 * np.abs(kept)
                assert (np.abs(y - expected) <= allowed).all(), (m, n, k, level)


@PER_TEAM
@PER_ISA
def test_dense_layers_over_the_same_weights(isa, threads):
    rng, lib = np.random.default_rng(2), load(SOURCE, isa)
    with team(lib, threads) as made:
        for m, n, k in SHAPES:
            x, weight = thinned(rng, m, k, 1.0), rng.standard_normal((n, k), np.float32)
            bias = rng.standard_normal(n, np.float32)
            left, right = x[:, :k].astype(np.float64), weight.T.astype(np.float64)
            for name, stored in (("by_rows", weight), ("by_columns", pack_columns(weight))):
                for offset in (None, bias):
                    y = np.full((m, n), np.nan, np.float32)
                    assert run(lib, made, name, [m, n, k, k + 3], [y, x, stored, offset]) == 0
                    expected = left @ right + (0 if offset is None else offset)
                    assert (np.abs(y - expected) <= bound(k, left, right)).all(), (name, m, n, k)


@PER_ISA
def test_skipped_weights_are_not_read(isa):
    """Not-a-number in rows of weights that meet a zero does not reach the result."""
    rng, lib = np.random.default_rng(3), load(SOURCE, isa)
    m, n, k = 1, 70, 40
    x, weight = thinned(rng, m, k, 0.5), rng.standard_normal((n, k), np.float32)
    weight[:, x[0, :k] == 0] = np.nan
    y, sums = np.full((m, n), np.nan, np.float32), np.empty((PARTS, 4, padded(n)), np.float32)
    gate, hidden = thinned(rng, m, n, 1.0), np.full((m, n), np.nan, np.float32)
    thresholds = np.full(n, 0.2, np.float32)
    closed = np.abs(silu(gate[0, :n])) <= thresholds
    up = rng.standard_normal((n, k), np.float32)
    up[closed] = np.nan
    with team(lib, 2) as made:
        assert run(lib, made, "skipping", [m, n, k, k + 3], [y, x, pack_columns(weight), None, sums]) == 0
        dense = np.nan_to_num(x[:, :k])
        assert run(lib, made, "glu", [m, n, k, k, n + 3], [hidden, dense, up, None, gate, thresholds]) == 0
    assert np.isfinite(y).all()
    assert 0 < closed.sum() < n
    assert (hidden[0, closed] == 0).all()
    assert np.isfinite(hidden).all()


@PER_ISA
def test_no_rows_and_not_a_number(isa):
    lib, nothing = load(SOURCE, isa), np.zeros(64, np.float32)
    y = np.full((1, 5), 7, np.float32)
    with team(lib, 2) as made:
        assert run(lib, made, "skipping", [0, 5, 4, 4], [None, None, nothing, None, nothing]) == 0
        assert run(lib, made, "glu", [0, 5, 4, 4, 5], [None, None, nothing, None, nothing, nothing]) == 0
        x, sums = np.array([[np.nan, 0]], np.float32), np.empty((PARTS, 4, 32), np.float32)
        assert run(lib, made, "skipping", [1, 5, 2, 2], [y, x, pack_columns(np.ones((5, 2))), None, sums]) == 0
    assert np.isnan(y).all()


def test_columns_are_padded_with_zeros():
    packed = pack_columns(np.arange(66, dtype=np.float32).reshape(33, 2))

    assert packed.shape == (2, 64)
    assert packed[1, :33].tolist() == list(range(1, 67, 2))
    assert not packed[:, 33:].any()
    with pytest.raises(ValueError, match="2 axes"):
        pack_columns(np.zeros(3, np.float32))


def ffn(x: Tensor, gate: Tensor, up: Tensor, thresholds: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    hidden = OPS["sparse_glu"](x, up, None, F.linear(x, gate), thresholds, "silu")
    dense = OPS["swiglu"](F.linear(x, gate), F.linear(x, up))
    return x + OPS["sparse_linear"](hidden, down, None), x + F.linear(dense, down)


def ffn_weights(d: int, h: int) -> dict[str, Tensor]:
    shapes = {"gate": (h, d), "up": (h, d), "thresholds": (h,), "down": (d, h)}
    return {key: torch.randn(shape) / math.sqrt(shape[-1]) for key, shape in shapes.items()}


def test_one_copy_of_each_weight_for_sparse_and_dense_layers():
    """Two steps of an entry read a weight, in one layout; adding the residual is part of the kernel."""
    made = program(ffn, torch.randn(1, 24), weights=ffn_weights(24, 70))

    compiled = compile_program(made)

    stored = [layout.name for layout in compiled.weights["forward"]]
    assert sorted(stored) == ["down@columns", "gate@f32", "thresholds", "up"]
    names = [cost.name for cost in compiled.unit.costs["forward"]]
    assert sum(name.startswith("sparse") for name in names) == 2
    assert names.count("loop") == 0


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_compiled_layers_agree_with_float64(rows):
    weights = ffn_weights(40, 100)
    x = torch.randn(rows, 40)
    with sv.compile(program(ffn, x, weights=weights), threads=2) as compiled:
        found = compiled(x)
    expected = ffn(x.double(), *(w.double() for w in weights.values()))
    for actual, exact in zip(found.values() if isinstance(found, dict) else found, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_weight_computed_at_run_time_is_transposed_first():
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return OPS["sparse_linear"](x, weight * 2, None)

    x, weight = torch.randn(2, 12), torch.randn(37, 12)
    with sv.compile(program(function, x, weight), threads=1) as compiled:
        found = compiled(x, weight)
    actual = found if isinstance(found, Tensor) else next(iter(found.values()))
    torch.testing.assert_close(actual, function(x, weight), rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_open_gates_only():
    x, gate = torch.randn(2, 6, requires_grad=True), torch.tensor([[3.0, -9.0]] * 2, requires_grad=True)
    y = OPS["sparse_glu"](x, torch.randn(2, 6), None, gate, torch.tensor([0.1, 0.1]), "silu")
    OPS["sparse_linear"](y, torch.randn(3, 2), None).sum().backward()

    assert x.grad is not None
    assert gate.grad is not None
    assert gate.grad[:, 0].abs().min() > 0
    assert gate.grad[:, 1].tolist() == [0, 0]
