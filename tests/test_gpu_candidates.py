"""What launches for GPUs may be tuned over: other kernels for the same arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.sampling import SIZES
from tests.test_gpu_loops import FIRST, lowered, simulated

TILED = ("gemv", "matmul", "attention", "hadamard", "quantize_rows")


@pytest.mark.parametrize("name", ["attention", "linear_w8", "linear_bf16", "hadamard"])
def test_candidates_take_the_same_arguments(name: str):
    case = FIRST[name]
    entry, made = lowered(case)
    assert any(launch.others() for launch in made.launches)
    for launch in made.launches:
        found = launch.others()
        assert bool(found) == (launch.kernel.function in TILED)
        assert all(list(c.kernel.types.items()) == list(launch.kernel.types.items()) for c in found)
        assert len({launch.kernel.key, *(c.kernel.key for c in found)}) == len(found) + 1
    last = [(launch.others() or (launch,))[-1] for launch in made.launches]
    launches = [replace(a, kernel=b.kernel, grid=b.grid) for a, b in zip(made.launches, last, strict=True)]
    tensors = case.tensors(SIZES[0])
    results = [simulated(entry, m, tensors).run()["y0"] for m in (made, replace(made, launches=tuple(launches)))]
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
