"""How far the inputs of linear layers are from even: their largest value over the root mean square, and kurtosis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.next_token import empty_state
from sylvester.compiler.program import Entry, Program, binding, is_weight

LINEAR = torch.ops.aten.linear.default
SAMPLES = 4
"""Calibration samples that are looked at."""


def input_statistics(program: Program) -> dict[str, tuple[float, float]]:
    """Weight key -> (max / rms, kurtosis) of what linear layers of the main entry read; empty without calibration.

    Kurtosis is E[x^4] / E[x^2]^2: 3 for a normal distribution, more with outliers.
    """
    if program.calibration is None:
        return {}
    watch = _Watch(program, program.main)
    for sample in program.calibration.fit[:SAMPLES]:
        watch.run_on(sample)
    return {key: found.summary() for key, found in watch.moments.items()}


class _Moments:
    """Running sums over the inputs of one layer."""

    def __init__(self) -> None:
        self.count, self.second, self.fourth, self.most = 0, 0.0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        squares = x.double().square()
        self.count += x.numel()
        self.second += float(squares.sum())
        self.fourth += float(squares.square().sum())
        self.most = max(self.most, float(squares.max()))

    def summary(self) -> tuple[float, float]:
        mean = self.second / max(1, self.count) or 1.0
        return (self.most / mean) ** 0.5, self.fourth / max(1, self.count) / mean**2


class _Watch(fx.Interpreter):
    """Runs an entry and looks at what its linear layers read."""

    def __init__(self, program: Program, entry: Entry) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), entry.graph))
        self.program, self.entry = program, entry
        self.moments: dict[str, _Moments] = {}

    def run_on(self, sample: dict[str, Tensor]) -> None:
        states = empty_state(self.program, self.entry, sample)
        sources: dict[str, Any] = {"input": sample, "weight": self.program.weights, "state": states}
        with torch.no_grad():
            self.run(*(sources[binding(n).kind][binding(n).key] for n in self.entry.placeholders()))

    def run_node(self, n: fx.Node) -> Any:
        if n.target is LINEAR:
            given = arguments(n)
            if is_weight(given["weight"]):
                self.moments.setdefault(binding(given["weight"]).key, _Moments()).add(self.env[given["input"]])
        return super().run_node(n)
