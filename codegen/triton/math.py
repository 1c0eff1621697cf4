"""Functions that generated loops call: those of C that Triton's language lacks, and rounding towards minus infinity."""

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """To the nearest whole number, halves to even."""
    down = tl.floor(x)
    rest = x - down
    odd = down - 2.0 * tl.floor(down * 0.5)
    return down + tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), 1.0, 0.0)


@triton.jit
def truncated(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def log1p(x):
    """Exact in what 1 + x rounds away (Kahan)."""
    u = 1.0 + x
    ratio = tl.where((u == 1.0) | (u == float("inf")), 1.0, tl.log(u) / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, x * ratio))


@triton.jit
def expm1(x):
    """Exact in what exp(x) - 1 rounds away (Kahan)."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u - 1.0 == -1.0) | (u == float("inf"))
    near = (u - 1.0) * (x / tl.where(plain, 1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where(plain, u - 1.0, near))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def is_negative(x):
    """Whether the sign is minus, that of -0.0 too."""
    return (x < 0.0) | ((x == 0.0) & (1.0 / x < 0.0))


@triton.jit
def power(x, y):
    """x^y; of a finite negative base only with a whole exponent."""
    a = tl.abs(x)
    size = tl.exp2(y * tl.log2(a))
    size = tl.where((a == 1.0) & (y == y), 1.0, size)
    whole = (tl.floor(y) == y) | (a == float("inf")) | (a == 0.0)
    odd = (tl.floor(y) == y) & (tl.floor(y * 0.5) * 2.0 != y)
    negative = tl.where(odd, -size, tl.where(whole, size, float("nan")))
    return tl.where((y == 0.0) | (x == 1.0), 1.0, tl.where(is_negative(x), negative, size))


@triton.jit
def whole_power(x, n):
    """x^n of whole numbers, in as many bits as they have; with n < 0 what 1 / x^-n is without its fraction."""
    x, n = tl.broadcast(x, n)
    minus = x + 1 == 0
    inverse = tl.where(minus & (n % 2 != 0), -1, tl.where(minus | (x == 1), 1, 0))
    y = tl.full(x.shape, 1, x.dtype)
    square, rest = x, tl.where(n < 0, 0, n)
    while tl.max(tl.max(rest, 1), 0) > 0:
        y = tl.where(rest % 2 == 1, y * square, y)
        square, rest = square * square, rest // 2
    return tl.where(n < 0, inverse.to(x.dtype), y)


@triton.jit
def atan2(y, x):
    """The angle of (x, y) in (-pi, pi], to the precision of float32; -pi of (-1, -0.0).

    Of z = least / largest of |x| and |y|; past tan(pi / 8) by atan z = pi / 4 + atan((z - 1) / (z + 1)).
    """
    across, up = tl.abs(x), tl.abs(y)
    least, most = tl.minimum(across, up), tl.maximum(across, up)
    z = tl.where(most == 0.0, 0.0, tl.where(least == most, 1.0, least / most))
    far = z > 0.4142135623730951
    r = tl.where(far, (z - 1.0) / (z + 1.0), z)
    s = r * r
    series = 0.1059381365776062 - 0.060782209038734436 * s
    series = -0.33333316445350647 + s * (0.19998471438884735 + s * (-0.14243532717227936 + s * series))
    angle = r + r * s * series + tl.where(far, 0.7853981633974483, 0.0)
    angle = tl.where(up > across, 1.5707963267948966 - angle, angle)
    angle = tl.where(is_negative(x), 3.141592653589793 - angle, angle)
    angle = tl.where(is_negative(y), -angle, angle)
    return tl.where((x != x) | (y != y), float("nan"), angle)


@triton.jit
def floor_div(x, y):
    quotient = x // y
    rest = x - quotient * y
    return quotient - tl.where((rest != 0) & ((rest < 0) != (y < 0)), 1, 0)


@triton.jit
def floor_mod(x, y):
    return x - floor_div(x, y) * y


@triton.jit
def remainder(x, y):
    """With the sign of y; the quotient may be rounded up to the next whole number."""
    rest = tl.fma(-tl.floor(x / y), y, x)
    return tl.where((rest != 0.0) & ((rest < 0.0) != (y < 0.0)), rest + y, rest)


@triton.jit
def fmod(x, y):
    """With the sign of x; the quotient may be rounded up to the next whole number."""
    rest = tl.fma(-truncated(x / y), y, x)
    y = tl.where(x < 0.0, -tl.abs(y), tl.abs(y))
    return tl.where((rest != 0.0) & ((rest < 0.0) != (x < 0.0)), rest + y, rest)


@triton.jit
def times(x, y):
    return x * y


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def checked(at, limit, mask, error):
    """A position that memory is read or written at: one outside 0 .. limit - 1 is reported and becomes 0."""
    bad = ((at < 0) | (at >= limit)) & mask
    at, error = tl.broadcast(at.to(tl.int64), error + tl.where(bad, 0, 0))
    tl.store(error, 1, mask=bad)
    tl.store(error + 1, at, mask=bad)
    return tl.where(bad | (at < 0) | (at >= limit), 0, at)


@triton.jit
def divisor(x, mask, error):
    """An integer to divide by: 0 is reported and becomes 1."""
    bad = (x == 0) & mask
    tl.store(error + tl.where(bad, 0, 0), 3, mask=bad)
    return tl.where(x == 0, 1, x)


@triton.jit
def extreme(x, LEAST: tl.constexpr):
    """The largest of each row [R, B] -> [R, 1], or the smallest; NaN wins."""
    nan = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
    if LEAST:
        found = tl.min(tl.where(x != x, float("inf"), x), 1, keep_dims=True)
    else:
        found = tl.max(tl.where(x != x, float("-inf"), x), 1, keep_dims=True)
    return tl.where(nan > 0, float("nan"), found)


@triton.jit
def place_of(best, at, LEAST: tl.constexpr):
    """The first place of the largest of each row, or the smallest; of a NaN if there is one."""
    last = 9223372036854775807
    nan = best != best
    some = tl.max(nan.to(tl.int32), 1, keep_dims=True)
    if LEAST:
        found = tl.min(tl.where(nan, float("inf"), best), 1, keep_dims=True)
    else:
        found = tl.max(tl.where(nan, float("-inf"), best), 1, keep_dims=True)
    taken = tl.where(some > 0, nan, best == found)
    return tl.min(tl.where(taken, at, last), 1, keep_dims=True)
