"""Index polynomials agree with Python's integers, and what they claim to prove holds."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sylvester.codegen.index import (
    Atom,
    Index,
    Quotient,
    Remainder,
    Size,
    Var,
    atom,
    flatten,
    index,
    nonnegative,
    product,
    unflatten,
    within,
)
from sylvester.codegen.index_text import c_text

SIZES = (Size("s0"), Size("s1"))
FIXED = (Var("i0", index(4)), Var("i1", index(7)))
ROWS = (Var("r0", atom(SIZES[0])), Var("r1", atom(SIZES[1]) * 3))
Values = Mapping[Atom, int]


def evaluate(value: Index, values: Values) -> int:
    return sum(c * _product(_atom(a, values) for a in monomial) for monomial, c in value.terms)


def _product(numbers: object) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


def _atom(a: Atom, values: Values) -> int:
    if isinstance(a, Quotient):
        return evaluate(a.top, values) // evaluate(a.bottom, values)
    if isinstance(a, Remainder):
        return evaluate(a.top, values) % evaluate(a.bottom, values)
    return values[a]


@st.composite
def assignments(draw: st.DrawFn) -> Values:
    values: dict[Atom, int] = {s: draw(st.integers(1, 9)) for s in SIZES}
    for v in (*FIXED, *ROWS):
        values[v] = draw(st.integers(0, evaluate(v.extent, values) - 1))
    return values


positive = st.one_of(
    st.integers(1, 9).map(index),
    st.sampled_from([atom(s) for s in SIZES]),
    st.builds(lambda s, n: atom(s) * n, st.sampled_from(SIZES), st.integers(1, 4)),
)
leaves = st.one_of(st.integers(-9, 9).map(index), st.sampled_from([atom(a) for a in (*SIZES, *FIXED, *ROWS)]))
indices = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, b: a // b, inner, positive),
        st.builds(lambda a, b: a % b, inner, positive),
    ),
    max_leaves=6,
)


@given(indices, indices, positive, assignments())
def test_arithmetic_is_that_of_integers(a: Index, b: Index, n: Index, values: Values) -> None:
    x, y, m = (evaluate(e, values) for e in (a, b, n))

    results = (a + b, a - b, a * b, a // n, a % n)

    assert [evaluate(r, values) for r in results] == [x + y, x - y, x * y, x // m, x % m]


@given(indices, indices, indices)
def test_equal_polynomials_are_equal_objects(a: Index, b: Index, c: Index) -> None:
    assert a + b == b + a
    assert (a + b) * c == a * c + b * c
    assert hash(a + b - a) == hash(b)
    assert a + b - a == b


@given(st.lists(st.one_of(st.integers(1, 5).map(index), st.sampled_from([atom(s) for s in SIZES])), max_size=4))
def test_unflatten_undoes_flatten(shape: list[Index]) -> None:
    position = [atom(Var(f"i{d}", n)) if n != index(1) else index(0) for d, n in enumerate(shape)]

    assert unflatten(flatten(position, shape), shape) == position


@given(st.lists(positive, min_size=1, max_size=3), st.data(), assignments())
def test_flatten_undoes_unflatten(shape: list[Index], data: st.DataObject, values: Values) -> None:
    offset = Var("o", product(shape))
    place = {**values, offset: data.draw(st.integers(0, evaluate(product(shape), values) - 1))}

    position = unflatten(atom(offset), shape)

    assert [evaluate(i, place) for i in position] == _digits(place[offset], [evaluate(n, place) for n in shape])
    assert evaluate(flatten(position, shape), place) == place[offset]


def _digits(offset: int, shape: list[int]) -> list[int]:
    digits = []
    for n in reversed(shape[1:]):
        digits.append(offset % n)
        offset //= n
    return [offset, *reversed(digits)]


@given(indices, positive, assignments())
def test_proofs_are_sound(value: Index, limit: Index, values: Values) -> None:
    found = evaluate(value, values)

    if nonnegative(value):
        assert found >= 0
    if within(value, limit):
        assert 0 <= found < evaluate(limit, values)


def test_the_other_half_of_a_row_needs_no_division() -> None:
    """The partner of feature f among pairs of halves is f % 32 + (1 - f // 32) * 32, read through a view of heads."""
    f, head, token = (atom(Var(n, index(extent))) for n, extent in (("f", 64), ("h", 12), ("t", 9)))
    partner = f % 32 + (1 - f // 32) * 32

    assert unflatten(flatten([token, head, partner], [9, 12, 64]), [index(9), index(768)]) == [
        token,
        head * 64 + partner,
    ]
    assert within(partner, index(64))
    assert not within(partner, index(63))
    assert not within(partner - 1, index(64))


def test_proofs_that_lowering_relies_on() -> None:
    s, r, i = atom(SIZES[0]), atom(ROWS[0]), atom(FIXED[0])
    assert within(r * 4 + i, s * 4)
    assert within((r * 4 + i) % 3, index(3))
    assert nonnegative(s - 1)
    assert not nonnegative(s - 2)
    assert not nonnegative((s - 5) // 2)
    assert not within(r, s - 1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((atom(ROWS[0]) * 4 + atom(FIXED[0])) // 4, atom(ROWS[0])),
        ((atom(ROWS[0]) * 4 + atom(FIXED[0])) % 4, atom(FIXED[0])),
        ((atom(FIXED[1]) * atom(SIZES[0]) + atom(ROWS[0])) // atom(SIZES[0]), atom(FIXED[1])),
        (atom(SIZES[0]) // atom(SIZES[0]), index(1)),
    ],
)
def test_quotients_that_disappear(found: Index, expected: Index) -> None:
    assert found == expected


@given(indices, st.sampled_from(FIXED), st.data(), assignments())
def test_substitution_is_evaluation(value: Index, variable: Var, data: st.DataObject, values: Values) -> None:
    chosen = data.draw(st.integers(0, int(variable.extent.constant or 1) - 1))

    found = value.substitute({variable: index(chosen)})

    assert variable not in found.atoms
    assert evaluate(found, values) == evaluate(value, {**values, variable: chosen})


class CInt(int):
    """A 64-bit integer of C: division truncates."""

    def __add__(self, other: int) -> CInt:
        return CInt(int(self) + int(other))

    def __mul__(self, other: int) -> CInt:
        return CInt(int(self) * int(other))

    def __truediv__(self, other: int) -> CInt:
        magnitude = abs(int(self)) // abs(int(other))
        return CInt(magnitude if (self < 0) == (other < 0) else -magnitude)

    def __mod__(self, other: int) -> CInt:
        return CInt(int(self) - int(self / other) * int(other))


@given(indices, assignments())
def test_c_text_computes_the_same(value: Index, values: Values) -> None:
    names: dict[str, object] = {a.name: CInt(n) for a, n in values.items()}
    helpers = {"sv_floor_div": lambda a, b: CInt(int(a) // int(b)), "sv_floor_mod": lambda a, b: CInt(int(a) % int(b))}
    text = re.sub(r"(?<![\w])(\d+)", r"CInt(\1)", c_text(value, lambda a: a.name))

    assert eval(text, {"CInt": CInt, **helpers, **names}) == evaluate(value, values)
