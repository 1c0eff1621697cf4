"""Kernels over values of which many are zero, and the weights they skip rows of: W as it is, or transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sylvester.codegen.conv2d import NOTHING, Finish
from sylvester.codegen.index import Index
from sylvester.codegen.layout import PANEL
from sylvester.codegen.prelude import render

FEW_ROWS, PARTS = 4, 8
"""The most rows of x whose zeros are skipped (SV_FEW_ROWS), and parts of the depth that are summed apart."""
ACTIVATIONS: Mapping[str, str] = {"silu": "sv_silu", "gelu": "sv_gelu", "gelu_tanh": "sv_gelu_tanh"}


def strided_header() -> str:
    """What the kernels below and dense layers over such weights build on; equal texts may not follow each other."""
    return render("strided.h.in")


def sparse_glu(name: str, activation: str) -> str:
    """C text of an instance; it needs no scratch."""
    return render("sparse_glu.c.in", NAME=name, ACTIVATION=ACTIVATIONS[activation])


def sparse_linear(name: str, finish: Finish = NOTHING) -> str:
    """C text of an instance; `<name>_scratch(k)` is the scratch it needs per thread."""
    fields = finish.fields()
    finishing = render("finish.c.in", NAME=name, **fields)
    given = {key: fields[key] for key in ("PARAMETERS", "ARGUMENTS")}
    return finishing + render("sparse_linear.c.in", NAME=name, PARTS=PARTS, **given)


def padded(n: Any) -> Any:
    """Floats of a row of a transposed weight with n output features."""
    return (n + PANEL - 1) // PANEL * PANEL


def sum_floats(m: int | None, n: Index) -> Index:
    """Floats of the partial sums of `sparse_linear`; m rows, or None for an open number."""
    floats: Index = padded(n) * (PARTS * min(FEW_ROWS, FEW_ROWS if m is None else m))
    return floats


def pack_columns(weight: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """W [n, k] -> W^T [k, n padded with zeros to whole panels]."""
    if weight.ndim != 2:
        raise ValueError(f"a linear weight has 2 axes, got shape {weight.shape}")
    n, k = weight.shape
    turned = np.zeros((k, padded(n)), np.float32)
    turned[:, :n] = weight.T
    return turned
