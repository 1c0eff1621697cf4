"""Paley's bases as C tables: of each the square core that the rest of it follows from."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt

from sylvester.compiler.hadamard import Paley, Signs, paley_signs

LANES = 16
"""Floats of the longest vector: parts that are shorter lie in the lanes of one."""
WHOLE = 64
"""Smaller fields have their core stored whole. Q over a larger prime field is a window that moves over a column, over
another field a convolution over e axes of length p, which their Fourier transforms make sparse."""


@dataclass(frozen=True)
class Core:
    """The constant `name` of type sv_paley, the C text that defines it, and the floats of scratch that it needs."""

    name: str
    order: int
    text: str
    room: int


def core(base: Paley, part: int, transposed: bool) -> Core:
    """The core of a base over parts of so many floats."""
    turned = transposed and not base.second
    name = f"sv_paley_{base.order}_{min(part, LANES)}{'t' if turned else ''}"
    finish = f"{int(base.second)}, {int(base.q >= WHOLE)}, {-1 if turned else 1}"
    rows = base.order // 2 if base.second else base.order
    room = [rows * (64 if rows <= 128 else 32), 48 * base.order if part & (part - 1) else 0]
    if base.q >= WHOLE and base.e > 1:
        text = _fourier(name, base, finish)
        room = [112 * base.order]
    else:
        signs = _window(base) if base.q >= WHOLE else _whole(base, turned)
        text = _strips(name, signs, finish)
        if part < LANES:
            in_lanes = _lanes(name, signs, part * (base.second + 1), finish)
            text = f"#if SV_VL > {part}\n{in_lanes}#else\n{text}#endif\n"
            room.append(8 * (base.order * part + LANES))
    guard = name.upper()
    return Core(name, base.order, f"#ifndef {guard}\n#define {guard}\n{text}#endif\n", max(room))


def _whole(base: Paley, turned: bool) -> Signs:
    """B itself, or S of the second kind."""
    signs = paley_signs(base)
    if base.second:
        return signs[::2, ::2] - np.eye(base.q + 1, dtype=np.int8)
    return signs.T if turned else signs


def _square(base: Paley) -> Signs:
    """Q."""
    core = _whole(base, False)[1:, 1:]
    return core if base.second else core - np.eye(base.q, dtype=np.int8)


def _window(base: Paley) -> Signs:
    """w with Q[i, j] = w[i - j + q - 1]."""
    return np.roll(np.tile(_square(base)[:, 0], 2), -1)[:-1]


def _strips(name: str, signs: Signs, finish: str) -> str:
    """Entries (i, j) at i * row + j * col."""
    n = len(signs) if signs.ndim == 2 else (len(signs) + 1) // 2
    at = f"0, {n}, {n}, 1" if signs.ndim == 2 else f"{n - 1}, {n}, 1, -1"
    return _constant(name, signs.ravel(), at, finish)


def _lanes(name: str, signs: Signs, unit: int, finish: str) -> str:
    """Column j at j * col with every entry `unit` times; a vector may reach beyond the end."""
    table = np.repeat(signs.T, unit, -1).ravel()
    n = len(signs) if signs.ndim == 2 else (len(signs) + 1) // 2
    at = f"0, {n}, {unit}, {n * unit}" if signs.ndim == 2 else f"{(n - 1) * unit}, {n}, {unit}, {-unit}"
    return _constant(name, np.append(table, np.zeros(LANES, np.int8)), at, finish)


def _fourier(name: str, base: Paley, finish: str) -> str:
    """Q = T^T M T with the real orthonormal Fourier matrix on every axis of T."""
    p, q = base.p, base.q
    angle = 2 * np.pi / p * np.outer(np.arange(p), np.arange(1, p // 2 + 1))
    turn = np.vstack([np.ones(p) / np.sqrt(2), np.cos(angle).T, np.sin(angle).T]) * np.sqrt(2 / p)
    mixed = _square(base).astype(np.float64).reshape((p,) * (2 * base.e))
    for _ in range(2 * base.e):
        mixed = np.tensordot(mixed, turn, (0, 1))
    terms = 2 ** (base.e - 1)
    columns = np.argsort(-np.abs(mixed.reshape(q, q)), axis=1, kind="stable")[:, :terms]
    mix = np.take_along_axis(mixed.reshape(q, q), columns, 1)
    arrays = (
        _array("float", f"{name}_signs", turn.ravel())
        + _array("float", f"{name}_mix", mix.ravel())
        + _array("int", f"{name}_from", columns.ravel())
    )
    fields = f"{name}_signs, {q}, 0, 0, {finish}, {p}, {terms}, {name}_mix, {name}_from"
    return f"{arrays}static const sv_paley {name} = {{{fields}}};\n"


def _constant(name: str, signs: Signs, at: str, finish: str) -> str:
    start, rest = at.split(", ", 1)
    return (
        _array("float", f"{name}_signs", signs)
        + f"static const sv_paley {name} = {{{name}_signs + {start}, {rest}, {finish}, 0, 0, 0, 0}};\n"
    )


def _array(kind: str, name: str, values: npt.NDArray[Any]) -> str:
    """A constant array; float32 is written with as many digits as tell it from its neighbours."""
    exact = values.astype(np.float32) if kind == "float" and values.dtype == np.float64 else values
    return f"static const {kind} {name}[] = {{\n{fill(', '.join(map(str, exact.tolist())), 120)}}};\n"
