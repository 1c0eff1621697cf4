"""JSON values to and from frozen dataclasses, checked field by field against the annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value does not fit; the message starts with the path of the field."""


def load(cls: type[T], data: object, where: str = "") -> T:
    """Build the dataclass `cls` from parsed JSON. Every field without a default must be there; no other may."""
    if not isinstance(data, dict):
        raise SchemaError(f"{where or 'top level'}: expected an object, found {_short(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise SchemaError(f"{_join(where, unknown[0])}: unknown field, expected one of {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise SchemaError(f"{_join(where, name)}: missing")
    return cls(**{name: value_of(hints[name], item, _join(where, name)) for name, item in data.items()})


def value_of(hint: Any, data: object, where: str) -> Any:
    """`data` as the type of an annotation: plain types, unions of them, tuple[X, ...], dict[str, X], dataclasses."""
    if hint is Any:
        return data
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(get_args(hint), data, where)
    if origin is tuple:
        return tuple(value_of(get_args(hint)[0], x, f"{where}[{i}]") for i, x in enumerate(_expect(list, data, where)))
    if origin is dict:
        return {k: value_of(get_args(hint)[1], x, _join(where, k)) for k, x in _expect(dict, data, where).items()}
    if dataclasses.is_dataclass(hint):
        return load(typing.cast(type, hint), data, where)
    return _expect(hint, data, where)


def _union(options: tuple[Any, ...], data: object, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    plain = tuple(o for o in options if isinstance(o, type) and not dataclasses.is_dataclass(o))
    if len(plain) == len(options) and len(plain) > 1:
        return _expect(plain, data, where)
    return value_of(options[0], data, where)


def _expect(kind: Any, data: object, where: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(data, kinds) or (isinstance(data, bool) and bool not in kinds):
        raise SchemaError(f"{where}: expected {' or '.join(k.__name__ for k in kinds)}, found {_short(data)}")
    return data


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}..."
