"""Index polynomials as C expressions."""

from __future__ import annotations

from collections.abc import Callable

from sylvester.codegen.index import Atom, Index, Monomial, Quotient, Remainder, nonnegative


def c_text(value: Index, name: Callable[[Atom], str]) -> str:
    """The expression in C, whose division truncates; `name` renders sizes, variables and integers read from memory."""

    def factor(a: Atom) -> str:
        if not isinstance(a, (Quotient, Remainder)):
            return name(a)
        top, bottom = c_text(a.top, name), c_text(a.bottom, name)
        if nonnegative(a.top):
            return f"(({top}) {'/' if isinstance(a, Quotient) else '%'} ({bottom}))"
        return f"{'sv_floor_div' if isinstance(a, Quotient) else 'sv_floor_mod'}({top}, {bottom})"

    def term(monomial: Monomial, coefficient: int) -> str:
        factors = [factor(a) for a in monomial]
        return " * ".join(factors if factors and coefficient == 1 else [str(coefficient), *factors])

    return " + ".join(term(m, c) for m, c in value.terms) or "0"
