"""The manifest of a program: symbols with their ranges, inputs, weights, state and outputs of every entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.numbers import int_oo

from sylvester.backends.minimum import holds_at
from sylvester.compiler.buckets import PADDED
from sylvester.compiler.manifest import (
    DraftSpec,
    EntrySpec,
    Generation,
    Manifest,
    OutputSpec,
    SlotSpec,
    Symbol,
    TensorSpec,
)
from sylvester.compiler.program import Entry, Program, binding, value
from sylvester.compiler.schema import load
from sylvester.compiler.stages import DRAFT, KEY, stages_of
from sylvester.compiler.steady import unsteady
from sylvester.compiler.target import Target
from sylvester.compiler.uniform import is_uniform

Size = int | str
EXPORT_MINIMUM = 2
"""torch.export assumes sizes of at least 2; graphs hold for 1 as well unless a view needs a second element."""


def manifest(
    program: Program,
    target: Target,
    *,
    isas: Sequence[str] = (),
    weights: Mapping[str, Sequence[str]] | None = None,
    steady: bool = False,
) -> Manifest:
    """All of the manifest but the files. `weights` names the stored tensors of an entry where they are packed anew.

    `steady`: the kernels of the backend give few rows at once the bits that each has alone.
    """
    entries = {name: entry_spec(program, entry, (weights or {}).get(name)) for name, entry in program.entries.items()}
    slots = {n: SlotSpec(s.index, dtype_text(s.dtype), shape_text(s.shape)) for n, s in program.state.items()}
    info = program.info
    generates = bool(slots) and info.get("max_length")
    return Manifest(
        target=target.name,
        entries=entries,
        isas=tuple(isas),
        state=slots,
        output=OutputSpec(str(info.get("output_type", "tensor"))),
        generation=_generation(program, steady) if generates else None,
        threads=target.threads,
    )


def _generation(program: Program, steady: bool) -> Generation:
    info = program.info
    stages = stages_of(info) if KEY in info else ()
    ends = tuple(info.get("eos_token_ids", ()))
    draft = load(DraftSpec, info[DRAFT]) if DRAFT in info else None
    verified = steady and unsteady(program) is None
    padded = bool(info.get(PADDED))
    return Generation(int(info["max_length"]), ends, stages, is_uniform(program), verified, draft, padded)


def entry_spec(program: Program, entry: Entry, weights: Sequence[str] | None = None) -> EntrySpec:
    results = zip(entry.outputs, entry.results(), strict=True)
    return EntrySpec(
        symbols=symbols(program, entry),
        inputs=tuple(tensor_spec(binding(n).key, value(n)) for n in entry.placeholders("input")),
        weights=tuple([binding(n).key for n in entry.placeholders("weight")] if weights is None else weights),
        states=tuple(binding(n).key for n in entry.placeholders("state")),
        outputs=tuple(tensor_spec(o.name, value(n)) for o, n in results if o.kind == "output"),
    )


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_text(tensor.dtype), shape_text(tensor.shape))


def dtype_text(dtype: torch.dtype) -> str:
    """The dtype without its `torch.` prefix, which is numpy's name where numpy has the type."""
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int | torch.SymInt]) -> tuple[Size, ...]:
    return tuple(size_text(n) for n in shape)


def size_text(size: int | torch.SymInt) -> Size:
    """A number, or the expression of a symbolic size."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else str(expression)
    return int(size)


def symbols(program: Program, entry: Entry) -> tuple[Symbol, ...]:
    """The symbols in the shapes of inputs and state, by name: the order of `sizes` in compiled code."""
    found: dict[str, tuple[Any, Any]] = {}
    for node in entry.placeholders():
        for size in value(node).shape:
            if isinstance(size, torch.SymInt):
                found |= {str(s): (s, size.node.shape_env) for s in size.node.expr.free_symbols}
    limits = _length_limits(program, entry)
    lowest = {symbol: _lower(symbol, shape_env) for symbol, shape_env in found.values()}
    relaxed = lowest if program.info.get("least_size", 1) < EXPORT_MINIMUM else {}
    for symbol, least in relaxed.items():
        if least == EXPORT_MINIMUM and holds_at(entry, lowest | {symbol: 1}):
            lowest[symbol] = 1
    return tuple(_symbol(name, lowest[found[name][0]], *found[name], limits.get(name)) for name in sorted(found))


def _lower(symbol: Any, shape_env: Any) -> int:
    interval = shape_env.var_to_range.get(symbol)
    return EXPORT_MINIMUM if interval is None else max(int(interval.lower), EXPORT_MINIMUM)


def _symbol(name: str, lower: int, symbol: Any, shape_env: Any, limit: int | None) -> Symbol:
    interval = shape_env.var_to_range.get(symbol)
    upper = None if interval is None or interval.upper is int_oo else _finite(interval.upper)
    bounds = [n for n in (upper, limit) if n is not None]
    return Symbol(name, lower, min(bounds) if bounds else None)


def _finite(bound: Any) -> int | None:
    """Upper bounds next to the largest 64-bit integer are torch's way to say unbounded."""
    return int(bound) if bound.is_Integer and int(bound) < 2**62 else None


def _length_limits(program: Program, entry: Entry) -> dict[str, int]:
    """Token dimensions end at the model's longest sequence: caches hold no more, and masks were recognised up to it."""
    if not program.info.get("max_length"):
        return {}
    ids = [n for n in entry.placeholders("input") if not value(n).dtype.is_floating_point]
    return {symbol: int(program.info["max_length"]) for n in ids for symbol in _token_symbols(n)}


def _token_symbols(node: fx.Node) -> list[str]:
    shape = shape_text(value(node).shape)
    return [str(shape[1])] if len(shape) > 1 and isinstance(shape[1], str) else []
