"""What a compiled model returns: the values by name, readable like a dict, a tuple and an object with attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sylvester.compiler.errors import CompileError


class Outputs(dict[str, Any]):
    """`out["logits"]`, `out.logits` and `out[0]` are the same value."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no output {name!r}, there are {list(self)}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def package(kind: str, values: Mapping[str, Any]) -> Any:
    """The values as the traced model returned them: "tensor", "tuple" or "dict"."""
    if kind == "tensor" and len(values) == 1:
        return next(iter(values.values()))
    if kind in ("tuple", "tensor"):
        return tuple(values.values())
    if kind == "dict":
        return Outputs(values)
    raise CompileError(f"unknown output type {kind!r}, expected 'tensor', 'tuple' or 'dict'")
