"""The vector math functions against float64 over wide ranges, with infinities, zeros and NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernel_harness import export, load, run, supported, team

EXACT = {
    "exp": torch.exp,
    "exp_negative": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "rsqrt": torch.rsqrt,
}
CANCELS = {"gelu", "gelu_tanh"}
"""Far below zero these are a tiny difference of large terms, also in the reference: their error is absolute."""
LOOP = """float *y = p[0]; const float *x = p[1]; int64_t lo, hi;
    sv_split(i[0], 16, t, &lo, &hi);
    #pragma omp simd
    for (int64_t j = lo; j < hi; j++) y[j] = sv_{0}(x[j]);"""
SOURCE = "".join(export(name, LOOP.format(name)) for name in EXACT)


def samples() -> np.ndarray:
    powers = 10.0 ** np.linspace(-37, 38, 20001)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 88.5, -103.0, 3e38, -3e38]
    parts = [np.linspace(-110, 110, 80001), np.linspace(-2, 2, 20001), powers, -powers, special]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_close_to_float64(isa, name):
    x = samples()
    x = x[~(x > 0)] if name == "exp_negative" else x
    y = np.empty_like(x)
    lib = load(SOURCE, isa)
    with team(lib, 2) as made:
        assert run(lib, made, name, [len(x)], [y, x]) == 0

    with np.errstate(over="ignore"):
        exact = EXACT[name](torch.from_numpy(x).double()).numpy()
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)

    np.testing.assert_array_equal(y[~finite], rounded[~finite])
    floor = 3e-7 if name in CANCELS else 100 * np.finfo(np.float32).tiny if name == "silu" else 1.3e-38
    error, allowed = np.abs(y[finite] - exact[finite]), 4e-7 * np.abs(exact[finite]) + floor
    worst = np.argmax(error / allowed)
    assert error[worst] <= allowed[worst], (x[finite][worst], y[finite][worst], exact[finite][worst])
