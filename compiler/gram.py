"""E[x^T x] of what layers read on calibration data, and factors of it: an error D of a weight costs |D L|^2 there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.activations import matrix
from sylvester.compiler.calls import arguments
from sylvester.compiler.errors import CompileError
from sylvester.compiler.next_token import empty_state
from sylvester.compiler.program import Program, binding
from sylvester.compiler.progress import report

FLOOR = 7e-6
"""Part of the mean of the diagonal that the least eigenvalue is lifted to where the matrix is not positive definite."""
ROWS_AT_ONCE = 4096


def input_grams(program: Program, layers: Collection[fx.Node], stage: str = "inputs") -> dict[fx.Node, Tensor]:
    """Layer of the main entry -> float64 [k, k], the mean of x^T x over all rows of `program.calibration.fit`.

    Layers over one value share one matrix.
    """
    samples = program.calibration.fit if program.calibration else ()
    source_of = {layer: arguments(layer)["input"] for layer in layers}
    watch = Watch(program, set(source_of.values()))
    for number, sample in enumerate(samples):
        report(stage, number, len(samples))
        watch.run_on(sample)
    report(stage, len(samples), len(samples))
    means = {source: watch.sums[source] / watch.rows[source] for source in watch.sums}
    for source, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise CompileError("the calibration data gives a layer inputs that are not finite", at=source)
    return {layer: means[source] for layer, source in source_of.items()}


class Watch(fx.Interpreter):
    """Runs the main entry and sums x^T x over the rows of some values."""

    def __init__(self, program: Program, values: Collection[fx.Node]) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), program.main.graph))
        self.program = program
        self.watched = {node.name: node for node in values}
        self.sums: dict[fx.Node, Tensor] = {}
        self.rows: dict[fx.Node, int] = {}

    def run_on(self, sample: Mapping[str, Tensor]) -> Any:
        """The results of the entry for one call; caches start empty."""
        with torch.no_grad():
            return self.run_with_gradient(sample)

    def run_with_gradient(self, sample: Mapping[str, Tensor]) -> Any:
        entry = self.program.main
        sources: dict[str, Any] = {
            "input": sample,
            "weight": self.program.weights,
            "state": empty_state(self.program, entry, sample),
        }
        return self.run(*(sources[binding(n).kind][binding(n).key] for n in entry.placeholders()))

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        node = self.watched.get(n.name)
        if node is not None:
            for rows in matrix(found).detach().float().split(ROWS_AT_ONCE):
                self.sums[node] = self.sums.get(node, 0) + (rows.T @ rows).double()
                self.rows[node] = self.rows.get(node, 0) + len(rows)
        return found


class Whitening:
    """The Cholesky factor L of A = L L^T [k, k], in float64; None stands for the identity."""

    def __init__(self, gram: Tensor | None) -> None:
        self.factor = None if gram is None else _factor(gram)

    def apply(self, weight: Tensor) -> Tensor:
        """W [.., k] -> W L, whose squared norm is that of the outputs."""
        return weight if self.factor is None else weight @ self.factor

    def undo(self, weight: Tensor) -> Tensor:
        """W L -> W."""
        if self.factor is None:
            return weight
        flat: Tensor = torch.linalg.solve_triangular(self.factor, weight.flatten(0, -2), upper=False, left=False)
        return flat.reshape(weight.shape)


def _factor(gram: Tensor) -> Tensor:
    """The lower factor; where A is not positive definite, of A + (floor - least eigenvalue) I."""
    found: Tensor
    found, failed = torch.linalg.cholesky_ex(gram)
    if not failed and float(found.diagonal().min()) ** 2 > FLOOR * 1e-6 * float(gram.diagonal().mean()):
        return found
    least = float(torch.linalg.eigvalsh(gram)[0])
    ridge = max(-least, 0.0) + FLOOR * (float(gram.diagonal().mean()) or 1.0)
    found = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return found
