"""The vector math functions against float64 over wide ranges, with infinities, zeros and NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernel_harness import export, load, run, supported, team

EXACT = {
    "exp": torch.exp,
    "exp_normal": torch.exp,
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
    x = x[~(x < -87.3) & ~(x > 88.3)] if name == "exp_normal" else x
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


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_gelu_is_better_than_floats_of_erf(isa):
    """At most 1.2e-7 max(|x|, 1) from float64, relative error 4e-3 down to -5.5, 0 below -12."""
    x = np.concatenate([np.linspace(-40, 20, 600001), np.linspace(-1, 1, 100001) ** 9]).astype(np.float32)
    y = np.empty_like(x)
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        assert run(lib, made, "gelu", [len(x)], [y, x]) == 0

    tail = x < 0
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    exact[tail] = x[tail].astype(np.float64) / 2 * torch.erfc(-torch.from_numpy(x[tail]).double() * 0.5**0.5).numpy()
    error = np.abs(y - exact)
    assert (error <= 1.2e-7 * np.maximum(np.abs(x), 1)).all(), x[np.argmax(error / np.maximum(np.abs(x), 1))]
    seen = (x > -5.5) & (np.abs(x) > 1e-30)
    relative = error[seen] / np.abs(exact[seen])
    assert relative.max() < 4e-3, x[seen][relative.argmax()]
    assert relative[np.abs(x[seen]) < 0.5].max() < 4e-7
    assert (y[x < -12] == 0).all()
