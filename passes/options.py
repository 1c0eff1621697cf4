"""Options of passes, checked when an instance is made."""

from __future__ import annotations

from collections.abc import Collection


def require_choice(option: str, found: object, known: Collection[object]) -> None:
    if found not in known:
        raise ValueError(f"{option} is {found!r}, expected one of {tuple(known)}")


def require_numbers(option: str, found: object) -> None:
    """Distinct layer numbers from 0, as a tuple."""
    if not isinstance(found, tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in found):
        raise TypeError(f"{option} is {found!r}, expected a tuple of layer numbers such as (3, 7)")
    if any(n < 0 for n in found) or len(set(found)) < len(found):
        raise ValueError(f"{option} is {found!r}, expected distinct numbers from 0")


def require_count(option: str, found: object, least: int) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{option} is {found!r}, expected a whole number from {least}")


def require_fraction(option: str, found: object) -> None:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < 1:
        raise ValueError(f"{option} is {found!r}, expected a number between 0 and 1")
