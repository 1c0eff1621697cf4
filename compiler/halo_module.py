"""A traced model as a module that trains: the parameters of the model under their names, its calls and results."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from sylvester.compiler import ops
from sylvester.compiler.differentiable import CPU, fused_attention, makes_tensor
from sylvester.compiler.errors import InputError, Unsupported
from sylvester.compiler.halo_kernels import arithmetic
from sylvester.compiler.halo_saving import counted, saving
from sylvester.compiler.inputs import named_arguments
from sylvester.compiler.program import Binding, Entry, Program, binding, value
from sylvester.compiler.training_trace import Captured, turned_on

if TYPE_CHECKING:
    from sylvester.compiler.halo_sharded import Sharding

EXACT = "exact"
SAVED = (EXACT, "int8")
"""How activations are kept for the backward pass, other than by linear layers."""
CONSTANTS = "halo_constants"
"""Submodule of tensors that the trace holds and the model has no name for."""


def require_saved(saved: str) -> None:
    if saved not in SAVED:
        raise ValueError(f"saved is {saved!r}, expected one of {SAVED}")


@dataclass(frozen=True)
class Report:
    """Keys of the weights that train in `format`, of others with the reason, and what multiplies."""

    level: int
    format: str
    rewritten: tuple[str, ...]
    kept: Mapping[str, str]
    notes: tuple[str, ...] = ()
    arithmetic: str = ""
    saved: str = EXACT
    saving: Mapping[str, int] = field(default_factory=dict)
    """Ops that save activations in 8 bits, by name."""

    def __str__(self) -> str:
        lines = [f"HALO-{self.level} in {self.format}: {len(self.rewritten)} linear layers, {self.arithmetic}"]
        if self.saved != EXACT:
            ops = ", ".join(f"{count} {name}" for name, count in self.saving.items()) or "no op"
            lines.append(f"  saved in {self.saved} for the backward pass by {ops}; by all others as it is")
        lines += [f"  stays as it is: {key}: {why}" for key, why in self.kept.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class Expected:
    """What an input looks like; None stands for a size that may change."""

    dtype: torch.dtype
    sizes: tuple[int | None, ...]

    @staticmethod
    def of(fact: Tensor) -> Expected:
        return Expected(fact.dtype, tuple(n if isinstance(n, int) else None for n in fact.shape))

    def fits(self, x: Tensor) -> bool:
        same = x.dtype == self.dtype and x.ndim == len(self.sizes)
        return same and all(n is None or n == m for n, m in zip(self.sizes, x.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('*' if n is None else str(n) for n in self.sizes)}]"


class HaloModule(nn.Module):
    """Calls like those of the model it was made from, with the examples' inputs; parameters are those of the model."""

    sharding: Sharding | None = None
    """What `halo_shard` has split."""

    def __init__(self, model: nn.Module, captured: Captured, report: Report, simulate: bool = True) -> None:
        super().__init__()
        self._report, self._simulate = report, simulate
        adopt(self, model)
        self._bindings = tuple(_bindings(self, captured.program))
        self._form, self._signature = captured.form, inspect.signature(model.forward)
        entry = captured.program.main
        self._expected = {binding(n).key: Expected.of(value(n)) for n in entry.placeholders("input")}
        self._taken = tuple(captured.inputs.tensors)
        self._graphs = {
            (True, CPU): _function(turned_on(entry)),
            (False, CPU): _function(entry),
        }
        self._running: dict[torch.device, dict[bool, fx.GraphModule]] = {}
        self.train(model.training)

    @property
    def report(self) -> Report:
        """What trains how, on the device where the parameters are."""
        found, device = self._report, next(self.parameters()).device
        return replace(found, arithmetic=arithmetic(found.format, device), saving=self._saving(device))

    def _saving(self, device: torch.device) -> dict[str, int]:
        return counted(self.running(device)[True])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._arguments(args, kwargs)
        return self._form.fill(iter(self._results(given)))

    def _results(self, given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        device = next(iter(given.values())).device
        operands = [given[b.key] if b.kind == "input" else self._tensor(b.key) for b in self._bindings]
        return cast(Sequence[Tensor], self._graph(device)(*operands))

    def _graph(self, device: torch.device) -> fx.GraphModule:
        self._require_arithmetic(device)
        return self.running(device)[self.training]

    def _require_arithmetic(self, device: torch.device) -> None:
        if not self._simulate and (how := arithmetic(self._report.format, device)).startswith("simulated"):
            raise Unsupported(
                f"training in {self._report.format} on {device} is {how}", hint="allow it by simulate=True, or use int8"
            )

    def graphs(self, device: torch.device) -> dict[bool, fx.GraphModule]:
        """What training and evaluation compute; operands are those of `bindings`."""
        graphs = self._graphs
        return {mode: graphs.get((mode, device)) or _moved(graphs[mode, CPU], device) for mode in (True, False)}

    def running(self, device: torch.device) -> dict[bool, fx.GraphModule]:
        """What runs in training and in evaluation: the graphs, with what training saves as `saved` says."""
        if device not in self._running:
            self._running[device] = self._with_saved(self.graphs(device))
        return self._running[device]

    def run_with(self, graphs: Mapping[bool, fx.GraphModule], device: torch.device) -> None:
        """Compute with other graphs of the same operands and results, on one device."""
        self._graphs = {(training, device): graph for training, graph in graphs.items()}
        self._running.clear()

    def _with_saved(self, graphs: dict[bool, fx.GraphModule]) -> dict[bool, fx.GraphModule]:
        if self._report.saved == EXACT:
            return graphs
        inputs = [place for place, bound in enumerate(self._bindings) if bound.kind == "input"]
        return {True: saving(graphs[True], inputs), False: graphs[False]}

    @property
    def bindings(self) -> tuple[Binding, ...]:
        return self._bindings

    def _tensor(self, key: str) -> Tensor:
        path, _, name = key.rpartition(".")
        return cast(Tensor, getattr(self.get_submodule(path), name))

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        bound = self._signature.bind(*args, **kwargs)
        given = {name: found for name, found, _ in named_arguments(bound)}
        if set(given) != set(self._taken):
            raise InputError(
                f"got the inputs {sorted(given)}, expected {sorted(self._taken)}",
                hint="the module takes the inputs of the examples it was traced with",
            )
        for name, expected in self._expected.items():
            found = given[name]
            if not isinstance(found, Tensor) or not expected.fits(found):
                shown = f"{found.dtype}{list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise InputError(f"input {name!r} is {shown}, expected {expected}")
        return given


def adopt(module: nn.Module, model: nn.Module) -> None:
    """All parameters and buffers of the model, under their names; tied ones stay one tensor."""
    kept = set(model.state_dict(keep_vars=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder, last = holder_of(module, name)
        holder.register_parameter(last, parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        holder, last = holder_of(module, name)
        holder.register_buffer(last, buffer, persistent=name in kept)


def holder_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = cast(nn.Module, module._modules[part])
    return module, last


def _bindings(module: nn.Module, program: Program) -> Iterator[Binding]:
    """What each placeholder stands for, with weights by the names they have in the module."""
    names = {n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
    for node in program.main.placeholders():
        bound = binding(node)
        if bound.kind == "input" or bound.key in names:
            yield bound
            continue
        holder, last = holder_of(module, f"{CONSTANTS}.{bound.key.replace('.', '_')}")
        holder.register_buffer(last, program.weights[bound.key], persistent=False)
        yield Binding("weight", f"{CONSTANTS}.{last}")


def _function(entry: Entry) -> fx.GraphModule:
    """The graph, with attention that takes memory linear in the keys, and without facts."""
    chosen = entry.clone()
    for node in chosen.graph.nodes:
        if node.target is ops.attention.target:
            node.target = fused_attention
        node.meta = {}
    return fx.GraphModule(nn.Module(), chosen.graph)


def _moved(found: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph where tensors that it makes are on another device."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(found.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function" and makes_tensor(node):
            node.update_kwarg("device", device)
    return fx.GraphModule(nn.Module(), graph)
