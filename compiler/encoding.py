"""Node arguments and op names as JSON, and back. Only torch operators and plain arithmetic can be named."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sylvester.compiler import ops  # noqa: F401  (registers the dialect)
from sylvester.compiler.errors import ArtefactError, Unsupported

ARITHMETIC = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
    "not_", "getitem",
)  # fmt: skip
SYMBOLIC = ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum")
PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in ARITHMETIC},
    **{f"torch.{name}": getattr(torch, name) for name in SYMBOLIC if hasattr(torch, name)},
    **{f"math.{name}": getattr(math, name) for name in ("trunc", "floor", "ceil")},
}
NAMES = {function: name for name, function in PYTHON.items()}
CONSTANTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
OVERLOAD = re.compile(r"(\w+)\.(\w+)\.(\w+)")


def operator_name(node: fx.Node) -> str:
    """`aten.add.Tensor`, or `operator.mul`; refuses what cannot be found again by name."""
    target = node.target
    if isinstance(target, OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    if target in NAMES:
        return NAMES[target]
    raise Unsupported(f"cannot save a call of {target!r}", at=node, hint="save programs of torch operators only")


def resolve(name: str) -> Callable[..., Any]:
    """The op of a name."""
    if name in PYTHON:
        return PYTHON[name]
    parts = OVERLOAD.fullmatch(name)
    try:
        found: Any = torch.ops
        for part in parts.groups() if parts else ():
            found = getattr(found, part)
    except AttributeError as error:
        raise ArtefactError(f"unknown op {name!r}", hint="import the package that registers it") from error
    if not isinstance(found, OpOverload):
        raise ArtefactError(f"{name!r} is not the name of an op")
    return found


def encode(argument: Any, at: fx.Node) -> Any:
    """A JSON value; everything but bool, int, str, None and finite floats is a one-key object, or a list."""
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, list | tuple):
        return [encode(a, at) for a in argument]
    if isinstance(argument, dict):
        return {"dict": {str(key): encode(item, at) for key, item in argument.items()}}
    for kind, cls in CONSTANTS.items():
        if isinstance(argument, cls):
            return {kind: str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    raise Unsupported(f"cannot save an argument of type {type(argument).__name__}", at=at)


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument that `encode` wrote."""
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, item),) = data.items()
    match kind:
        case "node":
            return nodes[item]
        case "dict":
            return {key: decode(inner, nodes) for key, inner in item.items()}
        case "float":
            return float(item)
        case "device":
            return torch.device(item)
        case _ if kind in CONSTANTS and isinstance(found := getattr(torch, item, None), CONSTANTS[kind]):
            return found
    raise ArtefactError(f"unknown argument {data!r}")
