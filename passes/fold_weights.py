"""bn(conv(x, W) + b) -> conv(x, s W) + (b - m) s + t, s (x W^T) -> x (s W)^T, x s W^T -> x (W s)^T: scales go into weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

aten = torch.ops.aten
LINEAR = aten.linear.default
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
SCALES = (aten.mul.Tensor, aten.div.Tensor)
ATTENTION = aten.scaled_dot_product_attention.default
DIALECT_ATTENTION = torch.ops.sylvester.attention.default
ROW_VIEWS = (aten.reshape.default, aten.permute.default)


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Folds in float64 and casts back. A weight that others use is copied under a new key, never changed for them."""

    name: ClassVar[str] = "fold-weights"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        folder = Folder(program)
        for entry in program.entries.values():
            for node in entry.calls():
                fold = FOLDS.get(node.target)
                if fold is not None:
                    folder.visit(entry, node, fold)
        return folder.changes
