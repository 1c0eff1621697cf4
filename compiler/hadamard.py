"""Hadamard matrices H of order n, H H^T = n I, from Paley's and Sylvester's constructions, and fast products with them.

H = B_1 (x) ... (x) B_r (x) S with bases B of Paley's orders q + 1 and 2 (q + 1) over GF(q) and Sylvester's S of order
2^k (Paley, "On orthogonal matrices", 1933). Among such products of an order, the one with the fewest additions is
taken, then the one with the smallest base, then the bases in ascending order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Signs = npt.NDArray[np.int8]
MOST_AT_ONCE = 6
"""Stages of a Walsh-Hadamard transform in one matrix product, which passes over the memory less often."""


@dataclass(frozen=True, order=True)
class Paley:
    """A base over GF(p^e): I of order q + 1 for q = 3 mod 4, II of order 2 (q + 1) and symmetric for q = 1 mod 4."""

    order: int
    p: int
    e: int

    @property
    def q(self) -> int:
        return int(self.p**self.e)

    @property
    def second(self) -> bool:
        return self.q % 4 == 1

    @property
    def additions(self) -> int:
        """Per value of a product; the second kind is one of half the size on sums and differences."""
        return self.q + 2 if self.second else self.q

    def __str__(self) -> str:
        field = f"GF({self.p})" if self.e == 1 else f"GF({self.p}^{self.e})"
        return f"Paley {'II' if self.second else 'I'} over {field}"


@dataclass(frozen=True, order=True)
class Scheme:
    """A product of Paley bases and 2^k; schemes compare by what is preferred."""

    additions: int
    """Per value of a transform."""
    order: int
    """Of the product of the bases."""
    bases: tuple[Paley, ...]
    k: int


@lru_cache(4096)
def prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p prime."""
    p = next((d for d in range(2, math.isqrt(max(q, 0)) + 1) if q % d == 0), q)
    e = round(math.log(q, p)) if p > 1 else 0
    return (p, e) if e and p**e == q else None


def paley(order: int) -> Paley | None:
    """The base of an order; the second construction where both have one: it takes half as many additions."""
    if order < 12 or order % 4 or order & (order - 1) == 0:
        return None
    half = order // 2 - 1
    found = (prime_power(half) if half % 4 == 1 else None) or prime_power(order - 1)
    return Paley(order, *found) if found else None


@lru_cache(4096)
def find(n: int, smallest: int = 12) -> Scheme | None:
    """The preferred scheme of order n over bases of at least `smallest`."""
    if n & (n - 1) == 0:
        k = n.bit_length() - 1
        return Scheme(k, 1, (), k) if n > 0 else None
    found: list[Scheme] = []
    for order in (d for d in range(smallest, n + 1, 4) if n % d == 0):
        base = paley(order)
        rest = find(n // order, order) if base else None
        if base and rest:
            additions = base.additions + rest.additions
            found.append(Scheme(additions, order * rest.order, (base, *rest.bases), rest.k))
    return min(found, default=None)


def scheme_of(n: int) -> Scheme:
    """The scheme of order n; a ValueError when there is none."""
    found = find(n)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here, the largest block is {largest_block(n)}")
    return found


def base_order(n: int) -> int | None:
    """The order h of the base of n = h 2^k, 1 for powers of two; None when n has no matrix."""
    found = find(n)
    return None if found is None else found.order


def largest_block(n: int) -> int:
    """The largest divisor of n that is the order of a known matrix."""
    if n < 1:
        raise ValueError(f"a Hadamard matrix has an order of at least 1, got {n}")
    return next(n // d for d in range(1, n + 1) if n % d == 0 and find(n // d))


def scheme(n: int) -> str:
    """How width n is rotated, such as "12 x 2^4 (Paley II over GF(5))"."""
    block = largest_block(n)
    if block < n:
        return f"{n // block} blocks of {scheme(block)}"
    found = scheme_of(n)
    factors = [str(b.order) for b in found.bases] + ([f"2^{found.k}"] if found.k or not found.bases else [])
    return f"{' x '.join(factors)} ({', '.join(map(str, found.bases)) or 'Sylvester'})"


def _powers(p: int, e: int) -> list[int]:
    """1, x, x^2, ... of GF(p^e) as numbers of base p, where x^e = low for the first `low` that makes x primitive."""
    cycles = (_cycle(p, low) for low in product(range(p), repeat=e) if low[0])
    return next(cycle for cycle in cycles if len(cycle) == p**e - 1)


def _cycle(p: int, low: tuple[int, ...]) -> list[int]:
    """The powers of x until they are 1 again."""
    one = power = (1, *([0] * (len(low) - 1)))
    found: list[int] = []
    while power != one or not found:
        found.append(sum(digit * p**i for i, digit in enumerate(power)))
        power = tuple((d + power[-1] * c) % p for d, c in zip((0, *power[:-1]), low, strict=True))
    return found


def _jacobsthal(p: int, e: int) -> Signs:
    """Q[i, j] = chi(a_i - a_j), where chi of GF(p^e) is 1 on squares, -1 on other values but 0; a_i has digits of i."""
    squares = np.arange(1, p, dtype=np.int64) ** 2 % p if e == 1 else np.array(_powers(p, e)[::2])
    chi = np.full(p**e, -1, np.int8)
    chi[squares], chi[0] = 1, 0
    table = chi.reshape((p,) * e)
    for axis in range(e):
        shifted = np.take(table, np.arange(1, 2 * p) % p, axis)
        table = np.lib.stride_tricks.sliding_window_view(shifted, p, axis)[..., ::-1]
    return table.reshape(p**e, p**e)


@lru_cache(4)
def paley_signs(base: Paley) -> Signs:
    """The base as int8 [order, order], not to be written to."""
    n, second = base.q + 1, base.second
    s = np.zeros((n, n), np.int8)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1 if second else -1, _jacobsthal(base.p, base.e)
    i = np.eye(n, dtype=np.int8)
    if not second:
        return s + i
    double = np.array([[1, 1], [1, -1]], np.int8)
    return np.kron(s, double) + np.kron(i, np.array([[1, -1], [-1, -1]], np.int8))


def base(h: int) -> Tensor:
    """int8 [h, h] for an h that `base_order` gives."""
    if base_order(h) != h:
        raise ValueError(f"{h} is not the order of a base, its base_order is {base_order(h)}")
    return matrix(h)


def matrix(n: int) -> Tensor:
    """int8 [n, n], the base times Sylvester's matrix of order 2^k."""
    whole = np.ones((1, 1), np.int8)
    for factor in factors(n):
        whole = np.kron(factor, whole)
    return torch.tensor(whole)


def transform(x: Tensor, block: int, transposed: bool = False) -> Tensor:
    """Blocks of the last axis as x H^T / sqrt(block), or x H / sqrt(block), by one factor after another."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y, stride = wide / math.sqrt(block), 1
    for signs in factors(block):
        n = len(signs)
        turn = torch.tensor(signs.T if transposed else signs, dtype=y.dtype, device=y.device)
        if stride == 1:
            y = y.reshape(*x.shape[:-1], x.shape[-1] // n, n) @ turn.T
        else:
            y = turn @ y.reshape(*x.shape[:-1], x.shape[-1] // (n * stride), n, stride)
        stride *= n
    return y.reshape(x.shape).to(x.dtype)


def factors(n: int) -> list[Signs]:
    """H of order n is their Kronecker product, the last first: Sylvester's of at most MOST_AT_ONCE, then the bases."""
    found = scheme_of(n)
    ones, rest = [], found.k
    while rest:
        ones.append(sylvester(min(rest, MOST_AT_ONCE)))
        rest -= min(rest, MOST_AT_ONCE)
    return [*ones, *(paley_signs(b) for b in reversed(found.bases))]


@lru_cache(8)
def sylvester(k: int) -> Signs:
    """Order 2^k."""
    return np.ones((1, 1), np.int8) if k == 0 else np.kron(np.array([[1, 1], [1, -1]], np.int8), sylvester(k - 1))
