"""The float functions of templates/math.h.in for TVM: the same polynomials, so that results agree to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

Value = Any
Keep = Callable[[Value], Value]
"""Binds a float32 value to a name, so that it is computed once."""

LOG2E, LN2_HI, LN2_LO = 1.44269504, 0.693145752, 1.42860677e-6
EXP = (1.395047682e-03, 8.368882434e-03, 4.166620601e-02, 1.666651890e-01, 0.5)
EXP_NORMAL = (8.374508109e-03, 4.189831488e-02, 1.666645869e-01, 4.999914660e-01)
EXP2 = (1.327647245e-03, 9.675540961e-03, 5.550713092e-02, 2.402212024e-01, 6.931469440e-01, 1.000000119)
TANH = (-5.717036548e-03, 2.065057899e-02, -5.374349526e-02, 1.333149125e-01, -3.333328392e-01)
ERF = (
    7.889119308e-05,
    -8.020841211e-04,
    5.189535332e-03,
    -2.685444459e-02,
    1.128360018e-01,
    -3.761262714e-01,
    1.128379166e00,
)
ERFC = (
    -1.94230188e-06,
    3.03470479e-05,
    -1.51384593e-04,
    -2.01138449e-04,
    7.12162256e-03,
    -5.25195301e-02,
    -4.59205449e-01,
    -1.15110505e00,
)


def number(value: float) -> Value:
    return tirx.const(float(value), "float32")


def polynomial(coefficients: tuple[float, ...], x: Value) -> Value:
    """Horner's scheme, the highest power first."""
    total = number(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + number(coefficient)
    return total


def clamp(x: Value, low: float, high: float) -> Value:
    below = tirx.Select(x > number(high), number(high), x)
    return tirx.Select(x < number(low), number(low), below)


def nearest(x: Value) -> Value:
    """The nearest integer, halves to even; `tirx.nearbyint` has no vector form."""
    return tirx.call_llvm_pure_intrin("float32", "llvm.nearbyint", x)


def is_nan(x: Value) -> Value:
    """By its bits: TVM takes x != x for false, and `tirx.isnan` has no vector form."""
    return (tirx.reinterpret("int32", x) & 0x7FFFFFFF) > 0x7F800000


def whole(x: Value) -> Value:
    return tirx.Cast("int32", x)


def power_of_two(exponent: Value) -> Value:
    """2^exponent from -126 to 127, 0 below, infinity above: at -127 and 128."""
    return tirx.reinterpret("float32", (exponent + 127) << 23)


def reduced(c: Value, keep: Keep) -> tuple[Value, Value]:
    """(n, r) with c = n log(2) + r, n the nearest integer.

    `math.h.in` rounds by adding and subtracting a large number, which TVM simplifies away.
    """
    n = keep(nearest(c * number(LOG2E)))
    return n, keep(c - n * number(LN2_HI) - n * number(LN2_LO))


def exp(x: Value, keep: Keep) -> Value:
    n, r = reduced(keep(clamp(x, -104.0, 89.0)), keep)
    p = polynomial(EXP, r) * r * r + r + number(1.0)
    half = whole(n) >> 1
    return p * power_of_two(half) * power_of_two(whole(n) - half)


def exp_normal(x: Value, keep: Keep) -> Value:
    n, r = reduced(keep(clamp(x, -88.02, 88.7)), keep)
    p = polynomial(EXP_NORMAL, r) * (r * r) + (r + number(1.0))
    return p * power_of_two(whole(n))


def erfc_biased(a: Value, bias: int, keep: Keep) -> Value:
    """erfc(a / sqrt(2)) 2^(bias - 127)."""
    x = keep(polynomial(ERFC, a) * a)
    c = keep(tirx.Select(x < number(-bias), number(-bias), x))
    n = keep(nearest(c))
    return polynomial(EXP2, keep(c - n)) * power_of_two(whole(n) + (bias - 127))


def sigmoid(x: Value, keep: Keep) -> Value:
    return number(1.0) / (number(1.0) + exp_normal(-x, keep))


def silu(x: Value, keep: Keep) -> Value:
    return x / (number(1.0) + exp_normal(-x, keep))


def gelu(x: Value, keep: Keep) -> Value:
    below = keep(erfc_biased(keep(tirx.abs(x)), 126, keep))
    return x * tirx.Select(x > number(0.0), number(1.0) - below, below)


def gelu_tanh(x: Value, keep: Keep) -> Value:
    u = keep(number(1.59576912) * (x + number(0.044715) * x * x * x))
    return x / (number(1.0) + exp_normal(-u, keep))


def with_sign_of(x: Value, size: Value) -> Value:
    return tirx.Select(x < number(0.0), -size, size)


def tanh(x: Value, keep: Keep) -> Value:
    a, s = keep(tirx.abs(x)), keep(x * x)
    far = with_sign_of(x, number(1.0) - number(2.0) / (exp(keep(number(2.0) * a), keep) + number(1.0)))
    return tirx.Select(a < number(0.625), x + x * s * polynomial(TANH, s), far)


def erf(x: Value, keep: Keep) -> Value:
    a, s = keep(tirx.abs(x)), keep(x * x)
    far = with_sign_of(x, number(1.0) - erfc_biased(keep(number(1.41421356) * a), 127, keep))
    return tirx.Select(a < number(1.0), x * polynomial(ERF, s), far)


FUNCTIONS: dict[str, Callable[[Value, Keep], Value]] = {
    "exp": exp, "sigmoid": sigmoid, "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "tanh": tanh, "erf": erf,
}  # fmt: skip
