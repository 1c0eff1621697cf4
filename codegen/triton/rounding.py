"""Rounding to whole numbers."""

import triton


@triton.jit
def nearest(x):
    """To the nearest whole number, ties to even, for |x| below 2^22: above 2^23 floats are whole numbers."""
    return (x + 12582912.0) - 12582912.0
