"""E[g^2] of the gradient g at what layers give: how much an error of a layer's output moves what the program says."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sylvester.compiler.gram import Watch
from sylvester.compiler.next_token import MASK, LanguageModel, language_model
from sylvester.compiler.program import Program

SAMPLES = 8
"""Calibration samples that are looked at."""


def sensitivities(program: Program, layers: Collection[fx.Node]) -> dict[fx.Node, float]:
    """Layer of the main entry -> mean square of its output's gradient over rows and features; all 1 without an answer.

    The gradient is that of the loss of the next token of a language model, else of a random mix of the float outputs,
    each over its own size: its square is then how far the outputs move.
    """
    samples = program.calibration.fit[:SAMPLES] if program.calibration else ()
    sums = dict.fromkeys(layers, 0.0)
    random = torch.Generator().manual_seed(0)
    for sample in samples:
        for layer, found in _gradients(program, layers, sample, random).items():
            sums[layer] += found
    useful = sums and all(math.isfinite(found) and found > 0 for found in sums.values())
    return sums if useful else dict.fromkeys(layers, 1.0)


def _gradients(
    program: Program, layers: Collection[fx.Node], sample: Mapping[str, Tensor], random: torch.Generator
) -> dict[fx.Node, float]:
    watch = _Probed(program, layers)
    with torch.enable_grad():
        results = watch.run_with_gradient(sample)
        outputs = {o.name: r for o, r in zip(program.main.outputs, results, strict=True) if o.kind == "output"}
        model = language_model(program)
        loss = _mixed(outputs, random) if model is None else _next_token_loss(model, outputs, sample)
        if loss.requires_grad:
            loss.backward()
    probes = watch.probes.items()
    return {layer: 0.0 if p.grad is None else float(p.grad.double().square().mean()) for layer, p in probes}


def _next_token_loss(model: LanguageModel, outputs: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> Tensor:
    """Summed over the tokens that follow another, so that each row of a gradient is of its own loss."""
    scores, tokens = outputs[model.scores][:, :-1].flatten(0, 1), sample[model.tokens][:, 1:].flatten()
    losses = F.cross_entropy(scores.float(), tokens, reduction="none")
    mask = sample.get(MASK)
    seen = None if mask is None else (mask[:, 1:] != 0).flatten()
    return losses.sum() if seen is None else losses[seen].sum()


def _mixed(outputs: Mapping[str, Tensor], random: torch.Generator) -> Tensor:
    total = torch.zeros(())
    for found in outputs.values():
        if found.is_floating_point():
            mix = torch.randn(found.shape, generator=random).to(found.dtype)
            total = total + (mix * found).sum() / found.detach().norm().clamp_min(1e-30)
    return total


class _Probed(Watch):
    """Adds zeros that collect gradients to what layers give."""

    def __init__(self, program: Program, layers: Collection[fx.Node]) -> None:
        super().__init__(program, ())
        self.layers = {node.name: node for node in layers}
        self.probes: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.name not in self.layers:
            return found
        probe = torch.zeros_like(found, requires_grad=True)
        self.probes[self.layers[n.name]] = probe
        return found + probe
