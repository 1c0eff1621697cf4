"""`torch.compile(model, backend="sylvester")`: graphs of Dynamo as artefacts of the `cpu` target, exact passes only.

What cannot be compiled is left to PyTorch, with a warning that says why; `report()` lists every graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._guards import tracing
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind

from sylvester.compiler.arrays import to_numpy, to_tensor
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.diagnose import first_line, quiet
from sylvester.compiler.driver import compile, raised
from sylvester.compiler.dynamo_region import Region
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.exported import to_program
from sylvester.compiler.program import Program, binding, value
from sylvester.compiler.target import Target

OPTIONS = ("threads",)
COMPILATIONS = 8
"""Times that a graph may be compiled, for changed weights, numbers or sizes."""
VARIANTS = {"AVX2": ("avx2",), "AVX512": ("avx512",)}
"""Of what PyTorch says of this CPU: the artefact does not leave this machine."""


class LeftToPyTorch(UserWarning):
    """A graph that runs as before, not compiled."""


@dataclass(frozen=True)
class Graph:
    """What became of a graph; `reason` says why it is left to PyTorch."""

    nodes: int
    reason: str = ""
    ledger: str = ""

    def __str__(self) -> str:
        return f"{self.nodes:5d} nodes: {self.reason or 'compiled'}"


_graphs: list[Graph] = []


def report() -> list[Graph]:
    """Every graph since the process began, recompiled ones again."""
    return list(_graphs)


def backend(
    graph: fx.GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., tuple[Any, ...]]:
    """A function that computes the graph. `options`: `threads`, as in `sv.compile`.

    Weights are packed when the graph is compiled; when one was changed since, it is compiled again in the next call.
    """
    chosen = dict(options or {})
    if unknown := sorted(set(chosen) - set(OPTIONS)):
        raise CompileError(f"unknown option {unknown[0]!r}", hint=f"options are {list(OPTIONS)}")
    nodes = len(graph.graph.nodes)
    try:
        _require_inference(graph, examples)
        return Function(Region(graph, examples), examples, chosen.get("threads"))
    except CompileError as error:
        _leave(nodes, error.message)
        return graph.forward


def _leave(nodes: int, reason: str) -> None:
    _graphs.append(Graph(nodes, reason))
    warnings.warn(f"a graph of {nodes} nodes is left to PyTorch: {reason}", LeftToPyTorch, stacklevel=3)


class Function:
    """A compiled region: called like the graph, with its weights among the arguments.

    Where PyTorch cannot capture a graph for any size, there is an artefact for each size behind the first axis.
    """

    def __init__(self, region: Region, examples: Sequence[Any], threads: int | None) -> None:
        self.region, self.threads, self.compilations = region, threads, 0
        self.nodes = len(region.source.graph.nodes)
        self.versions = region.versions(examples)
        self.artefacts: dict[tuple[int, ...], Compiled] = {}
        self._compile(examples)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        compiled = self._compiled(args)
        if compiled is None:
            return self.region.source(*args)  # type: ignore[no-any-return]
        given = self.region.tensors(args)
        found = compiled.outputs({name: to_numpy(name, tensor) for name, tensor in given.items()})
        types = {spec.name: spec.dtype for spec in compiled.manifest.entries["forward"].outputs}
        return self.region.results(args, [to_tensor(array, types[name]) for name, array in found.items()])

    def _compiled(self, args: Sequence[Any]) -> Compiled | None:
        """For these weights, numbers and sizes; None where they change too often, or fail."""
        versions = self.region.versions(args)
        if versions == self.versions and (known := self.artefacts.get(self.region.sizes_of(args))):
            return known
        if self.compilations >= COMPILATIONS:
            return None
        if versions != self.versions:
            self.close()
            self.region, self.versions = self.region.renewed(args), versions
        try:
            if self.compilations + 1 < COMPILATIONS:
                return self._compile(args)
            raise Unsupported(f"its weights, numbers or sizes have changed {COMPILATIONS - 1} times")
        except CompileError as error:
            self.compilations = COMPILATIONS
            _leave(self.nodes, error.message)
            return None

    def _compile(self, args: Sequence[Any]) -> Compiled:
        given = self.region.tensors(args)
        self.compilations += 1
        with tracing(None), torch.no_grad():
            try:
                program = _program(self.region, given)
            except SizesFixed:
                if not self.region.narrow():
                    raise
                program = _program(self.region, given)
            compiled = compile(program, target=_here(), threads=self.threads)
        self.artefacts[self.region.sizes_of(args)] = compiled
        _graphs.append(Graph(self.nodes, ledger=compiled.ledger))
        return compiled

    def close(self) -> None:
        for compiled in self.artefacts.values():
            compiled.close()
        self.artefacts.clear()


class SizesFixed(Unsupported):
    """A graph that Dynamo gives for any size cannot be captured for any."""


def _program(region: Region, given: Mapping[str, Tensor]) -> Program:
    program = raised(to_program(_exported(region, given), given))
    for node in program.main.placeholders("input"):
        _require_free(binding(node).key, value(node), region.free[binding(node).key])
    return program


def _here() -> Target:
    return Target("cpu", isas=VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ()))


def _require_inference(graph: fx.GraphModule, examples: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in examples):
        raise Unsupported("gradients may be wanted", hint="call it under torch.no_grad() or torch.inference_mode()")
    devices = {str(x.device) for x in examples if isinstance(x, Tensor)} - {"cpu"}
    if devices:
        raise Unsupported(f"a tensor is on {min(devices)}, expected cpu")


def _exported(region: Region, given: Mapping[str, Tensor]) -> ExportedProgram:
    dynamic = [dict.fromkeys(region.free[name], Dim.AUTO) for name in given]
    try:
        with quiet():
            exported = torch.export.export(region, (list(given.values()),), dynamic_shapes=(dynamic,), strict=False)
            changing = [n for n in exported.graph.nodes if _is_mutable(n)]
            functional = exported.run_decompositions({}) if changing else exported
    except Exception as error:
        raise SizesFixed(f"torch.export cannot capture it: {first_line(error)}") from error
    for spec in functional.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise Unsupported(f"it writes to {spec.target!r} in place", at=changing[0])
    return functional


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _require_free(name: str, fact: Tensor, axes: set[int]) -> None:
    """What Dynamo takes for any size, the code must take for any size."""
    fixed = sorted(axis for axis in axes if not isinstance(fact.shape[axis], SymInt))
    if fixed:
        raise SizesFixed(f"dimension {fixed[0]} of {name!r} may change, the captured graph fixes it")
