"""The next token from logits [rows, n]: the best, or one drawn as `compiler/sampling.py` draws it on the host.

A row gets -1 - id where the host must choose: its best logit is no finite number, or another token came so close that
rounding decides.
"""

import triton
import triton.language as tl

CLOSE = tl.constexpr(1e-4)
"""Relative difference of weights, times and sums that rounding never exceeds."""
FINITE = tl.constexpr(2139095040)
"""Finite floats in order are below it, and above -1 - it."""


@triton.jit
def ordered(x):
    """Floats as int32 in the same order; zeros are equal and NaN is above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, tl.where(bits < 0, bits ^ 2147483647, bits))


@triton.jit
def best_parts(parts, x, n, stride, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """parts int64 [rows, PARTS]: the largest logit of a part with its first place, in one number."""
    x += tl.program_id(0).to(tl.int64) * stride
    share = tl.cdiv(tl.cdiv(n, BLOCK), PARTS) * BLOCK
    best = tl.full([BLOCK], -9223372036854775808, tl.int64)
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, n), BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
        found = ordered(value).to(tl.int64) * 4294967296 + (4294967295 - i.to(tl.int64))
        best = tl.maximum(best, tl.where(i < n, found, -9223372036854775808))
    tl.store(parts + tl.program_id(0) * PARTS + tl.program_id(1), tl.max(best, 0))


@triton.jit
def best_of_parts(ids, parts, PARTS: tl.constexpr):
    best = tl.max(tl.load(parts + tl.program_id(0) * PARTS + tl.arange(0, PARTS)), 0)
    found, key = 4294967295 - (best & 4294967295), best >> 32
    tl.store(ids + tl.program_id(0), tl.where((key < FINITE) & (key > -1 - FINITE), found, -1 - found))


@triton.jit
def waits(i, seed):
    """A number > 0 for each id, as if drawn from the exponential distribution: SplitMix64 (Steele et al., 2014)."""
    z = i.to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    n = ((z ^ (z >> 31)) >> 11).to(tl.int64)
    low = (n.to(tl.float32) + 0.5) * 1.1102230246251565e-16
    v = ((9007199254740991 - n).to(tl.float32) + 0.5) * 1.1102230246251565e-16
    # -log(1 - v) = 2 artanh(v / (2 - v)), exact in what 1 - v rounds away
    t = v / (2.0 - v)
    q = t * t
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.where(v < 0.5, 2.0 * t * series, -tl.log(low))


@triton.jit
def logit_block(x, first, n, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    return i, tl.load(x + i, mask=i < n, other=float("-inf")).to(tl.float32)


@triton.jit
def worth(x, top, temperature, least, BY_COUNT: tl.constexpr):
    """What a threshold is set on: a count of logits, or the weights of those from `least` on in order."""
    weight = tl.where(x > float("-inf"), 1.0, 0.0) if BY_COUNT else tl.exp((x - top) / temperature)
    return tl.where(ordered(x) >= least, weight, 0.0)


@triton.jit
def threshold(x, n, top, temperature, least, wanted, BLOCK: tl.constexpr, BY_COUNT: tl.constexpr):
    """The largest logit, in order, such that those from it on are worth `wanted`; two of its bits a reading."""
    found = tl.cast(-2147483648, tl.int64)
    for step in range(16):
        size = tl.cast(1, tl.int64) << (30 - 2 * step)
        one = tl.zeros([BLOCK], tl.float32)
        two = tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, BLOCK):
            _, value = logit_block(x, first, n, BLOCK)
            w = worth(value, top, temperature, least, BY_COUNT)
            key = ordered(value).to(tl.int64)
            one += tl.where(key >= found + size, w, 0.0)
            two += tl.where(key >= found + 2 * size, w, 0.0)
            three += tl.where(key >= found + 3 * size, w, 0.0)
        reached = (tl.sum(one, 0) >= wanted).to(tl.int64) + (tl.sum(two, 0) >= wanted).to(tl.int64)
        found += size * (reached + (tl.sum(three, 0) >= wanted).to(tl.int64))
    return found


@triton.jit
def draw(
    ids, x, uniform, n, stride, temperature, top_k, top_p,
    BLOCK: tl.constexpr, KEPT: tl.constexpr, NUCLEUS: tl.constexpr,
):  # fmt: skip
    """The first to arrive of tokens that come at random times, each at the rate of its weight; one row a program.

    KEPT: of the top_k best; NUCLEUS: of the first in falling order that make up top_p. `uniform` are the bits of
    float64 numbers.
    """
    x += tl.program_id(0).to(tl.int64) * stride
    seed = tl.load(uniform + tl.program_id(0))
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, BLOCK):
        _, value = logit_block(x, first, n, BLOCK)
        most = tl.maximum(most, value)
        wrong = tl.maximum(wrong, ((value != value) | (value == float("inf"))).to(tl.int32))
    top = tl.max(most, 0)
    least = tl.cast(-2147483648, tl.int64)
    if KEPT:
        least = threshold(x, n, top, temperature, least, top_k.to(tl.float32), BLOCK, True)
    lightest, sure, single = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if NUCLEUS:
        lightest, sure, single = nucleus(x, n, top, temperature, least, top_p, BLOCK)
    time = float("inf") + tl.zeros([], tl.float32)
    later = time
    chosen = tl.zeros([], tl.int32)
    heaviness = tl.zeros([], tl.float32)
    for first in range(0, n, BLOCK):
        i, value = logit_block(x, first, n, BLOCK)
        weight = tl.exp((value - top) / temperature)
        keep = (ordered(value) >= least) & (weight >= lightest) & (i < n)
        if tl.max(keep.to(tl.int32), 0) > 0:
            arrival = tl.where(keep, waits(i, seed) / weight, float("inf"))
            soonest = tl.min(arrival, 0)
            place = tl.min(tl.where(arrival == soonest, i, 2147483647), 0)
            next_one = tl.min(tl.where(i == place, float("inf"), arrival), 0)
            later = tl.minimum(tl.minimum(later, next_one), tl.maximum(time, soonest))
            heaviness = tl.where(soonest < time, tl.sum(tl.where(i == place, weight, 0.0), 0), heaviness)
            chosen = tl.where(soonest < time, place, chosen)
            time = tl.minimum(time, soonest)
    clear = (later > time * (1 + CLOSE)) & (top > float("-inf")) & (tl.max(wrong, 0) == 0)
    if NUCLEUS:
        clear = clear & (heaviness > tl.where(single > 0, sure * (1 - CLOSE), sure * (1 + CLOSE)))
    found = chosen.to(tl.int64)
    tl.store(ids + tl.program_id(0), tl.where(clear, found, -1 - found))


@triton.jit
def weight_of(key, top, temperature):
    """The weight of a logit, given in order."""
    key = tl.maximum(key, -1 - FINITE).to(tl.int32)
    value = tl.where(key < 0, key ^ 2147483647, key).to(tl.float32, bitcast=True)
    return tl.exp((value - top) / temperature)


@triton.jit
def nucleus(x, n, top, temperature, least, top_p, BLOCK: tl.constexpr):
    """Lighter tokens are surely not in the nucleus; the lightest that surely are, and 1 where that is one token."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        _, value = logit_block(x, first, n, BLOCK)
        total += worth(value, top, temperature, least, False)
    mass = tl.sum(total, 0)
    outer = threshold(x, n, top, temperature, least, mass * (top_p + CLOSE), BLOCK, False)
    inner = threshold(x, n, top, temperature, least, tl.maximum(mass * (top_p - CLOSE), 1e-30), BLOCK, False)
    sure = weight_of(inner, top, temperature)
    alike = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        _, value = logit_block(x, first, n, BLOCK)
        w = worth(value, top, temperature, least, False)
        alike += tl.where((w >= sure * (1 - CLOSE)) & (w <= sure * (1 + CLOSE)), 1.0, 0.0)
    single = tl.where(tl.sum(alike, 0) == 1.0, 1.0, 0.0)
    return weight_of(outer, top, temperature) * (1 - CLOSE), sure, single
