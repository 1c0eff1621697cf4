"""Integer index expressions: polynomials over loop variables, sizes, quotients, remainders and loaded integers.

A flat offset such as ((b * S + s) * 6 + h) * 32 + d keeps its structure, so that a reshape is undone exactly:
`(h * 32 + d) // 32` is `h` because `d` is known to stay below 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Union

Number = Union["Index", int]


@dataclass(frozen=True)
class Size:
    """A symbolic size of an input; at least 1."""

    name: str


@dataclass(frozen=True)
class Var:
    """A loop variable running over [0, extent)."""

    name: str
    extent: Index


@dataclass(frozen=True)
class Quotient:
    top: Index
    bottom: Index


@dataclass(frozen=True)
class Remainder:
    top: Index
    bottom: Index


@dataclass(frozen=True)
class Loaded:
    """An integer read from memory (a token id, a position); `expression` is a scalar expression of codegen.scalar."""

    expression: Any
    limit: Index | None = None


Atom = Size | Var | Quotient | Remainder | Loaded
Monomial = tuple[Atom, ...]


@dataclass(frozen=True)
class Index:
    """Sum of coefficient * product of atoms; terms are sorted, so equal polynomials are equal objects."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Number) -> Index:
        right = index(other)
        if not (self.terms and right.terms):
            return self if self.terms else right
        return _collect([*self.terms, *right.terms])

    __radd__ = __add__

    def __neg__(self) -> Index:
        return self * -1

    def __sub__(self, other: Number) -> Index:
        return self + -index(other)

    def __rsub__(self, other: Number) -> Index:
        return index(other) - self

    def __mul__(self, other: Number) -> Index:
        right = index(other)
        if ONE in (self, right):
            return right if self == ONE else self
        return _collect([(_sorted(a + b), x * y) for a, x in self.terms for b, y in right.terms])

    __rmul__ = __mul__

    def __floordiv__(self, other: Number) -> Index:
        bottom = index(other)
        whole, rest = _nearest(self, bottom)
        if within(rest, bottom):
            return whole
        return whole + atom(Quotient(rest, bottom))

    def __mod__(self, other: Number) -> Index:
        bottom = index(other)
        _, rest = _nearest(self, bottom)
        return rest if within(rest, bottom) else atom(Remainder(rest, bottom))

    @cached_property
    def constant(self) -> int | None:
        """The value when no atom is left, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        """Every atom, also those inside quotients and remainders."""
        found: set[Atom] = set()
        for monomial, _ in self.terms:
            for a in monomial:
                found.add(a)
                if isinstance(a, (Quotient, Remainder)):
                    found |= a.top.atoms | a.bottom.atoms
                if isinstance(a, Loaded):
                    found |= a.expression.atoms
        return frozenset(found)

    @property
    def variables(self) -> frozenset[Var]:
        return frozenset(a for a in self.atoms if isinstance(a, Var))

    def coefficient(self, var: Atom) -> Index:
        """The factor of `var`, which must occur linearly: self = coefficient * var + rest."""
        terms = [(_without(m, var), c) for m, c in self.terms if var in m]
        return _collect(terms)

    def substitute(self, values: Mapping[Atom, Index]) -> Index:
        return sum_of(c * reduce(Index.__mul__, (_substitute(a, values) for a in m), index(1)) for m, c in self.terms)


ZERO, ONE = Index(()), Index((((), 1),))


def _substitute(a: Atom, values: Mapping[Atom, Index]) -> Index:
    if a in values:
        return values[a]
    if isinstance(a, Quotient):
        return a.top.substitute(values) // a.bottom.substitute(values)
    if isinstance(a, Remainder):
        return a.top.substitute(values) % a.bottom.substitute(values)
    if isinstance(a, Loaded):
        return atom(Loaded(a.expression.substitute(values), a.limit))
    return atom(a)


def _without(monomial: Monomial, a: Atom) -> Monomial:
    position = monomial.index(a)
    return monomial[:position] + monomial[position + 1 :]


def _key(a: Atom) -> str:
    """What atoms are sorted by; variables of one expression have different names."""
    return a.name if isinstance(a, (Size, Var)) else str(a)


def _sorted(monomial: Monomial) -> Monomial:
    return monomial if len(monomial) < 2 else tuple(sorted(monomial, key=_key))


def _collect(terms: Iterable[tuple[Monomial, int]]) -> Index:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = [(m, c) for m, c in total.items() if c]
    if len(kept) > 1:
        whole = _rejoined(total)
        if whole is not None:
            return whole
        kept.sort(key=lambda t: [_key(a) for a in t[0]])
    return Index(tuple(kept))


def _rejoined(total: Mapping[Monomial, int]) -> Index | None:
    """The sum with one (x // n) * n + x % n replaced by x, or None when it has none."""
    for monomial, coefficient in total.items():
        for a in monomial:
            if not coefficient or not isinstance(a, Remainder) or len(a.bottom.terms) != 1:
                continue
            ((divisor, factor),), rest = a.bottom.terms, _without(monomial, a)
            partner = _sorted((*rest, Quotient(a.top, a.bottom), *divisor))
            if partner != monomial and total.get(partner) == coefficient * factor:
                others = [(m, c) for m, c in total.items() if m not in (monomial, partner)]
                return _collect([*others, *(Index(((rest, coefficient),)) * a.top).terms])
    return None


def index(n: Number) -> Index:
    if isinstance(n, Index):
        return n
    return Index((((), int(n)),)) if n else ZERO


def atom(a: Atom) -> Index:
    return Index((((a,), 1),))


def sum_of(parts: Iterable[Index]) -> Index:
    return _collect([term for part in parts for term in part.terms])


def product(sizes: Iterable[Number]) -> Index:
    return reduce(Index.__mul__, (index(n) for n in sizes), index(1))


def divide(top: Index, bottom: Index, *, to_zero: bool = False) -> tuple[Index, Index]:
    """top = whole * bottom + rest, moving every term that `bottom` divides into `whole`; coefficients of the rest are
    not negative unless quotients round to zero."""
    if len(bottom.terms) != 1:
        return (index(1), index(0)) if top == bottom else (index(0), top)
    ((divisor, factor),) = bottom.terms
    whole, rest = [], []
    for monomial, coefficient in top.terms:
        left = _divide_monomial(monomial, divisor)
        if left is None:
            rest.append((monomial, coefficient))
            continue
        quotient, remainder = divmod(coefficient, factor)
        if to_zero and coefficient < 0 and remainder:
            quotient, remainder = quotient + 1, remainder - factor
        whole.append((left, quotient))
        rest.append((monomial, remainder))
    return _collect(whole), _collect(rest)


def _nearest(top: Index, bottom: Index) -> tuple[Index, Index]:
    """`divide` in the way that leaves a rest within the divisor, if one does: x - y may need its negative term."""
    whole, rest = divide(top, bottom)
    if any(c < 0 for _, c in top.terms) and not within(rest, bottom):
        other = divide(top, bottom, to_zero=True)
        if within(other[1], bottom):
            return other
    return whole, rest


def _divide_monomial(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    for a in divisor:
        if a not in monomial:
            return None
        monomial = _without(monomial, a)
    return monomial


def within(value: Index, limit: Index) -> bool:
    """Whether 0 <= value < limit can be proved from the extents of the variables."""
    bounds = _bounds(value)
    return bounds is not None and nonnegative(bounds[0]) and nonnegative(limit - 1 - bounds[1])


def _bounds(value: Index) -> tuple[Index, Index] | None:
    """A sum that value is not below and one that it is not above, if there are; atoms are never negative."""
    highest = {a: _highest(a) for m, _ in value.terms for a in m}
    known = {a: top for a, top in highest.items() if top is not None}
    if len(known) < len(highest):
        return None
    below = Index(tuple((m, c) for m, c in value.terms if c < 0 or not m))
    above = Index(tuple((m, c) for m, c in value.terms if c > 0 or not m))
    return below.substitute(known), above.substitute(known)


def _highest(a: Atom) -> Index | None:
    """The greatest value of an atom that cannot be negative."""
    if isinstance(a, Size):
        return atom(a)
    if isinstance(a, Var):
        return a.extent - 1
    if isinstance(a, Remainder):
        return a.bottom - 1
    if isinstance(a, Loaded):
        return None
    bounds = _bounds(a.top)
    if bounds is None or not nonnegative(bounds[0]) or None in (bounds[1].constant, a.bottom.constant):
        return None
    return bounds[1] // a.bottom


def nonnegative(value: Index) -> bool:
    """Whether value >= 0 can be proved, knowing only that sizes are at least 1."""
    if any(isinstance(a, Quotient) and not nonnegative(a.top) for m, _ in value.terms for a in m):
        return False
    shifted = value.substitute({a: atom(a) + 1 for a in value.atoms if isinstance(a, Size)})
    return all(c >= 0 for _, c in shifted.terms)


def flatten(indices: Sequence[Number], shape: Sequence[Number]) -> Index:
    """Row-major offset of `indices` in `shape`."""
    offset = index(0)
    for i, n in zip(indices, shape, strict=True):
        offset = offset * n + i
    return offset


def unflatten(offset: Index, shape: Sequence[Index]) -> list[Index]:
    """The row-major position of `offset` in `shape`; the inverse of `flatten`."""
    indices: list[Index] = []
    for n in reversed(shape[1:]):
        indices.append(offset % n)
        offset = offset // n
    return [*([offset] if shape else []), *reversed(indices)]
