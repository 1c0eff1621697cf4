"""Rotations of every width keep x W^T, whichever matrix they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sylvester.compiler import ops
from sylvester.compiler.hadamard import largest_block
from sylvester.compiler.rotation import Rotation, rotated

HARD = (172, 344, 668, 716, 1436, 1912, 2140, 2868, 3012, 3416, 3788, 4076, 4084)
"""Widths whose largest known matrix is small, or a Paley base of its own."""


def drift(rotation: Rotation, x: Tensor, weight: Tensor) -> float:
    """How far (x R) (W R)^T is from x W^T, when both are rotated as the passes do and multiplied in float32."""
    turned = rotation.apply(x.double()).float() @ rotated(weight, [(1, rotation)]).T
    exact = x.double() @ weight.double().T
    return float((turned - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("start", range(4, 516, 64))
def test_small_widths(start: int) -> None:
    for width in range(start, min(start + 64, 513), 4):
        x, weight = torch.randn(3, width), torch.randn(5, width)

        assert drift(Rotation.offline(width, seed=width), x, weight) < 1e-5
        assert drift(Rotation.hadamard(width, seed=width), x, weight) < 1e-5


@pytest.mark.parametrize("width", HARD)
def test_large_widths(width: int) -> None:
    x, weight = torch.randn(3, width), torch.randn(5, width)

    assert drift(Rotation.hadamard(width), x, weight) < 1e-5
    assert Rotation.hadamard(width).block == largest_block(width) >= 4
    if width < 1000:
        assert drift(Rotation.offline(width, 0), x, weight) < 1e-5


@pytest.mark.parametrize("width", [1, 2, 7, 9, 30, 12, 20])
@pytest.mark.parametrize("rotation", [Rotation.offline, Rotation.hadamard])
def test_rotations_are_orthogonal(width: int, rotation: object) -> None:
    q = rotation(width, 3).apply(torch.eye(width, dtype=torch.float64))  # type: ignore[operator]

    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "rotation"), [(24, Rotation.hadamard(8, 1)), (24, Rotation(6, 6, random=2))])
def test_every_width_of_a_wider_axis_is_rotated_alike(width: int, rotation: Rotation) -> None:
    x = torch.randn(2, width, 5)

    along = rotation.apply(x, axis=1)

    for start in range(0, width, rotation.width):
        part = slice(start, start + rotation.width)
        expected = rotation.apply(x[:, part].transpose(1, 2).contiguous()).transpose(1, 2)
        torch.testing.assert_close(along[:, part], expected)


def test_the_online_transform_is_the_folded_one() -> None:
    x, rotation = torch.randn(4, 24), Rotation.hadamard(24)

    torch.testing.assert_close(rotation.apply(x), ops.hadamard(x, 24))
    torch.testing.assert_close(ops.hadamard(rotation.apply(x), 24, True), x)


def test_both_axes_of_a_weight_are_rotated_in_turn() -> None:
    weight, inner, outer = torch.randn(12, 8), Rotation.offline(8, 1), Rotation.offline(12, 2)
    x = torch.randn(5, 8, dtype=torch.float64)

    done = rotated(weight, [(0, outer), (1, inner)])

    torch.testing.assert_close(inner.apply(x) @ done.double().T, outer.apply(x @ weight.double().T), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(24,), (6, 24), (24, 5), (24, 3, 5), (1, 7, 24)])
def test_tensors_of_any_rank_and_memory_order(shape: tuple[int, ...]) -> None:
    weight, rotation = torch.randn(shape), Rotation.offline(24, 5)
    axis = shape.index(24)
    strided = torch.randn(*shape, 2)[..., 0].copy_(weight)

    done = rotated(strided, [(axis, rotation)])

    assert done.dtype == torch.float32
    assert done.is_contiguous()
    torch.testing.assert_close(done, rotation.apply(weight.double(), axis).float())
    assert torch.equal(strided, weight)


def test_large_weights_are_rotated_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, steps = torch.randn(24, 20), [(0, Rotation.offline(24, 1)), (1, Rotation.offline(20, 2))]
    whole = rotated(weight, steps)

    monkeypatch.setattr("sylvester.compiler.rotation.VALUES_AT_ONCE", 30)
    monkeypatch.setattr("sylvester.compiler.rotation.EXACT", 10)

    torch.testing.assert_close(rotated(weight, steps), whole, rtol=0, atol=1e-6)


def test_half_precision_weights_are_widened_first() -> None:
    weight, rotation = torch.randn(8, 64).bfloat16(), Rotation.offline(64, 0)

    torch.testing.assert_close(rotated(weight, [(1, rotation)]), rotation.apply(weight.double()).float())


def test_a_rotation_spreads_outliers() -> None:
    x = torch.zeros(1, 768)
    x[0, [3, 70, 500]] = 30.0

    spread = Rotation.offline(768, 0).apply(x)

    assert float(spread.abs().max() / spread.square().mean().sqrt()) < 2
    assert float(x.abs().max() / x.square().mean().sqrt()) > 15


def test_random_matrices_do_not_favour_a_sign() -> None:
    diagonals = torch.cat([Rotation(6, 6, random=seed).matrix.diagonal() for seed in range(50)])

    assert 0.35 < float((diagonals > 0).double().mean()) < 0.65


@pytest.mark.parametrize(
    ("rotation", "text"),
    [
        (Rotation.hadamard(16), "Hadamard matrix of order 16 = 2^4 (Sylvester)"),
        (Rotation.hadamard(48, 1), "randomised Hadamard matrix of order 48 = 12 x 2^2 (Paley"),
        (Rotation.hadamard(30), "Hadamard matrix of order 2 in 15 blocks = 2^1 (Sylvester)"),
        (Rotation.offline(30, 1), "random orthogonal matrix of order 30"),
    ],
)
def test_what_the_ledger_says(rotation: Rotation, text: str) -> None:
    assert str(rotation).startswith(text)


@pytest.mark.parametrize(("width", "trivial"), [(1, True), (7, True), (9, True), (2, False), (6, False)])
def test_odd_widths_have_no_blocks(width: int, trivial: bool) -> None:
    assert Rotation.hadamard(width).trivial == trivial
    assert Rotation.offline(width, 0).trivial == (width == 1)
