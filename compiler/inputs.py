"""Example inputs: bind them to names, choose symbolic dimensions, widen sizes of 1 that torch.export would fix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sylvester.compiler.errors import TraceError

Tensors = dict[str, Tensor]
Examples = tuple[Any, ...] | Mapping[str, Any]
IMAGE_RANK = 4
BATCH, LENGTH = 2, 3
"""Sizes that stand in for an example size of 1."""


@dataclass(frozen=True)
class Inputs:
    """Example tensors by name, in call order; the first `positional` of them are passed by position."""

    tensors: Tensors
    positional: int = 0

    def call(self) -> tuple[tuple[Tensor, ...], Tensors]:
        """Arguments and keyword arguments."""
        items = list(self.tensors.items())
        return tuple(t for _, t in items[: self.positional]), dict(items[self.positional :])

    def resized(self, tensors: Tensors) -> Inputs:
        return Inputs(tensors, self.positional)


def bind(forward: Callable[..., Any], examples: object) -> Inputs:
    """Name each example by the parameter it is for. Every input must be a strided tensor on the CPU."""
    if examples is None or (isinstance(examples, tuple | Mapping) and not examples):
        raise TraceError("no example inputs", hint="give a tuple (positional) or a dict (keyword) of tensors")
    if not isinstance(examples, tuple | Mapping):
        hint = "write (x,)" if isinstance(examples, Tensor) else ""
        raise TraceError(f"example inputs are {_kind(examples)}, expected a tuple or a dict of tensors", hint=hint)
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(**examples) if isinstance(examples, Mapping) else signature.bind(*examples)
    except TypeError as error:
        names = [p.name for p in signature.parameters.values()]
        raise TraceError(f"example inputs do not fit forward: {error}", hint=f"forward takes {names}") from error
    named = list(named_arguments(bound))
    tensors = {name: check(name, value) for name, value, _ in named}
    if not tensors:
        raise TraceError("no example inputs: every one is None")
    return Inputs(tensors, sum(by_position for *_, by_position in named))


def named_arguments(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any, bool]]:
    """(name, value, by position) of each given argument; an explicit None for a default of None is not given."""
    parameters = bound.signature.parameters
    variadic = any(parameters[name].kind is inspect.Parameter.VAR_POSITIONAL for name in bound.arguments)
    for name, value in bound.arguments.items():
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{i}", item, True) for i, item in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from ((key, item, False) for key, item in value.items() if item is not None)
        elif variadic or kind is inspect.Parameter.POSITIONAL_ONLY:
            yield name, value, True
        elif value is not None or parameters[name].default is not None:
            yield name, value, False


def check(name: str, value: Any) -> Tensor:
    """The tensor, if it is one that can be traced."""
    if not isinstance(value, Tensor):
        hint = "give it a default in forward, or wrap the model in a module that fills it in"
        raise TraceError(f"input {name!r} is {_kind(value)}, expected a tensor", hint=hint)
    if value.layout is not torch.strided or value.is_quantized:
        raise TraceError(f"input {name!r} is a {value.layout} tensor of {value.dtype}, expected a plain dense tensor")
    if value.device.type != "cpu":
        hint = "the target decides where the model runs"
        raise TraceError(f"input {name!r} is on {value.device}, expected cpu", hint=hint)
    if value.numel() == 0:
        hint = "give an example with at least one element"
        raise TraceError(f"input {name!r} is empty: shape {list(value.shape)}", hint=hint)
    return value.detach()


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def free_dimensions(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions worth keeping symbolic: the batch, and the length of tokens or features."""
    if tensor.ndim >= IMAGE_RANK:
        return (0,)
    return tuple(range(min(tensor.ndim, 2)))


def automatic(model: nn.Module, inputs: Inputs) -> Any:
    """torch.export's `dynamic_shapes` with every free dimension left for torch to decide.

    None, which fixes every size, when forward takes an input by **kwargs: torch.export has no notation for that.
    """
    args, kwargs = inputs.call()
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    if any(bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD for name in arguments):
        return None
    return pytree.tree_map(lambda tensor: {d: Dim.AUTO for d in free_dimensions(tensor)}, arguments)


def same_batch(inputs: Inputs) -> Callable[..., None]:
    """A forward pre-hook that tells torch.export which inputs share their first size: those that do in the example."""
    names = [name for name, tensor in inputs.tensors.items() if tensor.ndim > 1]
    shared = [n for n in names if inputs.tensors[n].shape[0] == inputs.tensors[names[0]].shape[0]]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(inputs.tensors, args, strict=False)) | kwargs
        first, *others = [given[name].shape[0] for name in shared] or [0]
        for size in others:
            torch._check(size == first)

    return hook


def widenings(inputs: Inputs) -> list[Inputs]:
    """What to trace with, most general first and the inputs themselves last; torch.export fixes sizes of 1 for good."""
    whole = {n: t for n, t in inputs.tensors.items() if t.ndim}
    batch = {n: _repeat(t, 0, BATCH) for n, t in whole.items()} if all(t.shape[0] == 1 for t in whole.values()) else {}
    wide = {**inputs.tensors, **batch}
    short = {n: _repeat(t, 1, LENGTH) for n, t in wide.items() if 1 in free_dimensions(t) and t.shape[1] == 1}
    found = [{**wide, **short}] if short else []
    found += [wide] if batch else []
    return [*(inputs.resized(tensors) for tensors in found), inputs]


def _repeat(tensor: Tensor, dim: int, times: int) -> Tensor:
    return tensor.repeat_interleave(times, dim)


def fixed_dimensions(inputs: Inputs, facts: Mapping[str, Tensor]) -> list[str]:
    """One note per free dimension that the trace made a number."""
    return [
        f"input {name!r}: dimension {d} is fixed at {facts[name].shape[d]}"
        for name, tensor in inputs.tensors.items()
        for d in free_dimensions(tensor)
        if not isinstance(facts[name].shape[d], torch.SymInt)
    ]
