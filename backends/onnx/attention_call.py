"""The operands of an attention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from sylvester.backends.onnx.builder import Builder, Operand


@dataclass(frozen=True)
class Call:
    """The operands of an attention; keys and values are float."""

    q: Operand
    k: Operand
    v: Operand
    mask: Operand | None
    past: Operand | None
    scale: float
    causal: bool
    window: int
    softcap: float

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype


def end_of(b: Builder, call: Call) -> ir.Value:
    """The number of keys that the last query may see, without axes."""
    queries = b.read(call.q.shape[2], torch.int64)
    return queries if call.past is None else b.call("Add", b.read(call.past, torch.int64), queries)
