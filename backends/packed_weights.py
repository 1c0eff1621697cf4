"""The tensors an artefact stores: each weight in the layout its kernels read, made piece by piece while writing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sylvester.backends.signature import dtype_text
from sylvester.backends.tensor_writer import Deferred
from sylvester.codegen.formats import depth, packed, panel_bytes
from sylvester.codegen.layout import F32, PANEL, Layout
from sylvester.codegen.sparse import pack_columns, padded
from sylvester.compiler.binding import DTYPES
from sylvester.compiler.program import Program


def stored_tensors(program: Program, weights: Mapping[str, Iterable[Layout]]) -> dict[str, Deferred]:
    """Every stored tensor once, in order of first use."""
    layouts = {layout.name: layout for entry in weights.values() for layout in entry}
    return {name: _deferred(program, layout) for name, layout in layouts.items()}


def _deferred(program: Program, layout: Layout) -> Deferred:
    if layout.kind == "joined":
        return Deferred((sum(layout.lengths),), "float32", lambda: _joined(program, layout))
    if layout.kind == "plain":
        weight = program.weights[layout.keys[0]]
        name = dtype_text(weight.dtype)
        return Deferred(tuple(weight.shape), DTYPES.get(name, name), lambda: array(weight))
    if layout.kind == "columns":
        n, k = program.weights[layout.keys[0]].shape
        return Deferred((k, padded(n)), "float32", lambda: pack_columns(array(program.weights[layout.keys[0]])))
    shape = _packed_shape(program, layout)
    return Deferred(shape, "float32" if layout.format == F32 else "uint8", lambda: _packed(program, layout))


def _joined(program: Program, layout: Layout) -> NDArray[Any]:
    pairs = zip(layout.keys, layout.lengths, strict=True)
    return np.concatenate([array(program.weights[key]) if key else np.zeros(n, np.float32) for key, n in pairs])


def _packed(program: Program, layout: Layout) -> Iterator[NDArray[Any]]:
    weights = [_as_rows(array(program.weights[key])) for key in layout.keys]
    return packed(layout, weights, [array(program.weights[key]) for key in layout.scales])


def _packed_shape(program: Program, layout: Layout) -> tuple[int, ...]:
    widths = [program.weights[key].shape[:-1].numel() for key in layout.keys]
    panels = sum(-(-n // PANEL) for n in widths) if layout.ways > 1 else -(-sum(widths) // PANEL)
    k = depth(layout.format, program.weights[layout.keys[0]].shape[-1])
    return (panels, k, PANEL) if layout.format == F32 else (panels, panel_bytes(layout.format, k))


def _as_rows(weight: NDArray[Any]) -> NDArray[Any]:
    """Several matrices stored together lie one after another."""
    return weight if weight.ndim == 2 else weight.reshape(-1, weight.shape[-1])


def array(weight: Tensor) -> NDArray[Any]:
    """The values in numpy; bfloat16 and float8 as their bits."""
    plain = weight.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(np.uint16)
    return plain.view(torch.uint8).numpy() if plain.dtype == torch.float8_e4m3fn else plain.numpy()
