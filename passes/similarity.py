"""How little a layer turns the stream: the mean cosine between what goes in and what comes out, on calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer
from sylvester.compiler.observe import observe
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report

STAGE = "measure how layers turn the stream"


def similarity(program: Program, layers: Sequence[Layer]) -> list[float]:
    """One cosine per layer, over all tokens of the data to fit to."""
    return mean_cosines(program, [(layer.main.start, layer.main.end) for layer in layers])


def mean_cosines(program: Program, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> list[float]:
    """The mean cosine of each pair of streams of the main entry, token by token."""
    data = program.calibration
    if data is None or not data.fit:
        hint = "compile(..., calibration=texts)"
        raise CompileError("similarity is measured on calibration data, found none", hint=hint)
    sums, tokens = torch.zeros(len(pairs), dtype=torch.float64), 0
    for number, sample in enumerate(data.fit):
        report(STAGE, number, len(data.fit))
        values = observe(program, sample, {node for pair in pairs for node in pair})
        cosines = [F.cosine_similarity(values[a].double(), values[b].double(), -1).flatten() for a, b in pairs]
        sums += torch.stack([c.sum() for c in cosines])
        tokens += len(cosines[0]) if cosines else 0
    return [float(total) / max(tokens, 1) for total in sums]
