"""Sums of atoms on the CPU: in panels before linear layers, else as plain tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sylvester.backends.cpu import Cpu
from sylvester.backends.cpu_runtime import Engine
from sylvester.codegen.combined import UNROLLED, atom_layouts
from sylvester.compiler.progress import silent
from sylvester.compiler.shared_ops import combine
from sylvester.compiler.target import Target, host_architecture
from tests.programs import program

TARGET = Target("cpu", isas=("neon" if host_architecture() == "aarch64" else "avx2",))


def ran(made, folder, *xs):
    engine = Engine(folder, Cpu().build(made, TARGET, folder, silent))
    found = engine.run("forward", {f"x{i}": x.numpy() for i, x in enumerate(xs)})["y0"]
    engine.close()
    return found


@pytest.mark.parametrize(
    ("count", "n", "packed"), [(1, 32, True), (3, 96, True), (3, 37, False), (UNROLLED + 1, 32, False)]
)
@pytest.mark.parametrize("rows", [1, 9])
def test_linear_layers_over_sums(count, n, packed, rows, tmp_path):
    torch.manual_seed(0)
    weights = {
        "atoms": torch.randn(count, n, 19),
        "c": torch.randn(count),
        "d": torch.randn(count),
        "b": torch.randn(n),
    }

    def layers(x, atoms, c, d, b):
        first = F.linear(F.layer_norm(x, (19,)), combine(atoms, c), b)
        return F.gelu(first) + F.linear(x, combine(atoms, d))

    x = torch.randn(2, rows, 19)
    made = program(layers, x, weights=weights)
    assert bool(atom_layouts(made)) == packed
    wide = layers(x.double(), *(t.double() for t in weights.values()))
    np.testing.assert_allclose(ran(made, tmp_path, x), wide, rtol=1e-4, atol=1e-4)


def test_a_sum_that_is_also_a_result_is_plain(tmp_path):
    weights = {"atoms": torch.randn(2, 32, 8), "c": torch.randn(2)}
    x = torch.randn(3, 8)
    made = program(lambda x, atoms, c: x @ (combine(atoms, c) * 2).T + combine(atoms, c).sum(), x, weights=weights)
    assert not atom_layouts(made)
    total = torch.tensordot(weights["c"].double(), weights["atoms"].double(), 1)
    np.testing.assert_allclose(ran(made, tmp_path, x), x.double() @ (2 * total).T + total.sum(), rtol=1e-4, atol=1e-4)


def test_low_rank_parts_are_added(tmp_path):
    weights = {
        "atoms": torch.randn(2, 32, 8),
        "c": torch.randn(2),
        "left": torch.randn(32, 3),
        "right": torch.randn(3, 8),
    }
    x = torch.randn(3, 8)
    made = program(lambda x, a, c, p, q: F.linear(x, combine(a, c, p, q)), x, weights=weights)
    a, c, p, q = (t.double() for t in weights.values())
    np.testing.assert_allclose(
        ran(made, tmp_path, x), x.double() @ (torch.tensordot(c, a, 1) + p @ q).T, rtol=1e-4, atol=1e-4
    )


def test_half_of_the_factors_is_an_error():
    with pytest.raises(ValueError, match="both low-rank factors or none"):
        combine(torch.randn(2, 4, 4), torch.randn(2), torch.randn(4, 1))
