"""A module that trains by its rewritten joint graph, which is traced for every new sizes of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sylvester.compiler.halo_joint import Rewritten, rewrite
from sylvester.compiler.halo_module import HaloModule, Report
from sylvester.compiler.joint_graph import Joint, Trained, trained
from sylvester.compiler.training_trace import Captured

Sizes = tuple[tuple[tuple[int, ...], bool], ...]


class JointModule(HaloModule):
    """As `HaloModule`, with what autograd does spelled out as a graph; evaluation is that of the rewritten program."""

    def __init__(
        self, model: nn.Module, captured: Captured, rewritten: Captured, report: Report, simulate: bool = True
    ) -> None:
        super().__init__(model, rewritten, report, simulate)
        plain = HaloModule(model, captured, report)
        self.joint: list[Rewritten] = []
        """What was done to the graph for each sizes of the inputs."""
        self._plain = [plain]
        """In a list: its parameters are those of this module already."""
        self._trained: dict[Sizes, Trained] = {}

    def _results(self, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        if not (self.training and torch.is_grad_enabled()):
            return super()._results(given)
        inputs = [given[name] for name in self._taken]
        self._require_arithmetic(inputs[0].device)
        sizes = tuple((tuple(x.shape), x.requires_grad) for x in inputs)
        if sizes not in self._trained:
            self._trained[sizes] = trained(_Flat(self._plain[0], self._taken), tuple(inputs), self._rewrite)
        tensors = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
        return cast(Sequence[Tensor], self._trained[sizes](tensors, *inputs))

    def _rewrite(self, joint: Joint) -> None:
        names = self._names(self.report.rewritten)
        self.joint.append(rewrite(joint, self.report.level, self.report.format, names.__contains__))

    def _names(self, keys: Sequence[str]) -> set[str]:
        """Of the weights with these keys, all names: tied ones have several."""
        weights = {id(self.get_parameter(key)) for key in keys}
        return {name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in weights}


class _Flat(nn.Module):
    """A module of tensors in a row that returns its results in a row; the names of its parameters are those of it."""

    def __init__(self, module: HaloModule, taken: Sequence[str]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        self._module, self._taken = [module], tuple(taken)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return list(self._module[0]._results(dict(zip(self._taken, inputs, strict=True))))
