"""Scalar expressions: constants become what PyTorch makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from sylvester.codegen.scalar import Constant, cast

DTYPES = {"b8": torch.bool, "i64": torch.int64, "f32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -0.3, 2.7, -2.7, 1e-30])
def test_a_constant_is_converted_as_in_pytorch(value: float, dtype: str) -> None:
    found = cast(Constant(value, "f32"), dtype)

    assert isinstance(found, Constant)
    assert found.dtype == dtype
    assert torch.tensor(found.value, dtype=DTYPES[dtype]) == torch.tensor(value).to(DTYPES[dtype])


def test_what_is_no_number_is_true() -> None:
    assert cast(Constant(math.nan, "f32"), "b8") == Constant(1, "b8")
