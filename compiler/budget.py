"""What a compiled model may cost: size, latency, memory, and how far its predictions may move."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sylvester.compiler.errors import CompileError

BYTES = {
    "": 1.0, "b": 1.0,
    "kb": 1e3, "mb": 1e6, "gb": 1e9,
    "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30,
}  # fmt: skip
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
SHARES = {"": 1.0, "%": 1e-2}
NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ%]*)\s*((?:/\s*token)?)\s*")


@dataclass(frozen=True)
class Field:
    """How one field of a budget is written: units by name, and whether it may be nothing."""

    units: Mapping[str, float]
    forms: str
    zero: bool = False
    per_token: bool = False


SIZES = Field(BYTES, "bytes as a number, or a text such as '40MB', '1.5 GB', '512KiB' (B, kB, MB, GB, KiB, MiB, GiB)")
TIMES = Field(
    SECONDS, "seconds as a number, or a text such as '30ms', '30ms/token', '1.5 s' (us, ms, s)", per_token=True
)
DIVERGENCE = Field({"": 1.0}, "nats as a number or a text, such as 0.05", zero=True)
INCREASE = Field(SHARES, "a share such as 0.05, or a text such as '5%'", zero=True)
FIELDS: Mapping[str, Field] = {
    "size": SIZES,
    "latency": TIMES,
    "memory": SIZES,
    "max_kl": DIVERGENCE,
    "max_perplexity_increase": INCREASE,
}


@dataclass(frozen=True)
class Budget:
    """Bounds on what a compiled language model costs; at least one is given. After construction all are numbers.

    `size`: bytes of the stored weights. `latency`: seconds of one decode step. `memory`: bytes of a process that runs
    the model at its longest sequence. `max_kl`: mean KL(original || compiled) of the next token in nats, on the
    calibration data. `max_perplexity_increase`: share by which perplexity may grow there. A value that is not one of
    the forms of its field is a ValueError.
    """

    size: float | str | None = None
    latency: float | str | None = None
    memory: float | str | None = None
    max_kl: float | str | None = None
    max_perplexity_increase: float | str | None = None

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), field))
        if not self.bounds:
            raise ValueError(f"the budget is empty, expected at least one of {list(FIELDS)}")

    @property
    def bounds(self) -> dict[str, float]:
        """What is given, as numbers by field."""
        given = {name: getattr(self, name) for name in FIELDS}
        return {name: float(value) for name, value in given.items() if value is not None}

    @staticmethod
    def parse(given: Budget | str | Mapping[str, Any]) -> Budget:
        """A budget, a text such as "size=40MB,latency=5ms", or values by field; `CompileError` for anything else."""
        if isinstance(given, Budget):
            return given
        if isinstance(given, str):
            given = _fields(given)
        if not isinstance(given, Mapping):
            raise CompileError(
                f"budget is a {type(given).__name__}, expected a Budget", hint="budget=sv.Budget(size='40MB')"
            )
        for name in given:
            if name not in FIELDS:
                close = difflib.get_close_matches(str(name), FIELDS, 1, 0.5)
                guess = f"did you mean {close[0]!r}? " if close else ""
                raise CompileError(f"a budget has no field {name!r}", hint=f"{guess}its fields are {list(FIELDS)}")
        try:
            return Budget(**given)
        except ValueError as error:
            raise CompileError(str(error)) from error

    def __str__(self) -> str:
        return f"budget({', '.join(f'{name}={shown(name, value)}' for name, value in self.bounds.items())})"


def shown(name: str, value: float) -> str:
    """A value of a field in a unit that people read."""
    if FIELDS[name] is SIZES:
        unit = next((unit for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= least), "B")
        return f"{value / BYTES[unit.lower()]:.4g} {unit}"
    if FIELDS[name] is TIMES:
        return f"{value * 1e3:.4g} ms"
    return f"{value:.4g}" if FIELDS[name] is DIVERGENCE else f"{value:.3%}"


def _fields(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, given, value = part.partition("=")
        if not given:
            raise CompileError(f"budget has {part!r}, expected field=value", hint="such as size=40MB,latency=5ms")
        found[name.strip()] = value.strip()
    return found


def _number(name: str, given: object, field: Field) -> float | None:
    if given is None:
        return None
    found = _read(given, field)
    if found is None:
        raise ValueError(f"{name} is {given!r}, expected {field.forms}")
    if not math.isfinite(found) or found < 0 or (found == 0 and not field.zero):
        least = "0 or more" if field.zero else "more than 0"
        raise ValueError(f"{name} is {given!r}, expected a finite number, {least}: {field.forms}")
    return found


def _read(given: object, field: Field) -> float | None:
    """The number, or None for what is not written in a known form."""
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return None
    if not isinstance(given, str):
        return float(given)
    match = NUMBER.fullmatch(given.removeprefix("-"))
    if match is None or match[2].lower() not in field.units or (match[3] and not field.per_token):
        return None
    value = float(match[1]) * field.units[match[2].lower()]
    return -value if given.startswith("-") else value
