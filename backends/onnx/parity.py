"""Every graph is run beside the entry it was made from; where they differ, the first node that does is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from sylvester.backends.onnx.graph import numpy_of
from sylvester.backends.onnx.runtime import Graphs
from sylvester.compiler.binding import is_position
from sylvester.compiler.check import relative_error
from sylvester.compiler.errors import ContractBroken
from sylvester.compiler.program import Entry, Program, binding, value
from sylvester.compiler.quantized_ops import ATTENTIONS, LINEARS, QUANTISED
from sylvester.compiler.runner import State

FLOAT, BFLOAT16, WHOLE = "float32", "bfloat16", "whole numbers"
TOLERANCE = {FLOAT: 1e-4, BFLOAT16: 1e-1, WHOLE: 3e-1}
"""Largest error relative to the largest value, by the coarsest products of an entry: onnxruntime rounds other values,
and each layer passes on what the one before it rounded."""
LARGEST_STATE = 1 << 30
"""Bytes of caches above which an entry is not run."""
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far an output of a graph is from the entry's. `data` says on which inputs."""

    entry: str
    output: str
    data: str
    dtype: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


def compare(program: Program, graphs: Graphs) -> tuple[list[Agreement], list[str]]:
    """Agreements of every output on examples and random inputs, and which entries were not run."""
    found: list[Agreement] = []
    skipped = []
    for name, entry in program.entries.items():
        reason = _unfit(program, entry)
        if reason:
            skipped.append(f"parity of {name!r} was not measured: {reason}")
            continue
        for data, inputs in inputs_of(entry):
            found += _agreements(program, graphs, name, data, inputs)
    return found, skipped


def require(program: Program, graphs: Graphs, agreements: list[Agreement], made: Mapping[str, Any]) -> None:
    """`ContractBroken` names the first node of the worst output that differs."""
    worst = max(agreements, key=lambda a: a.error / a.tolerance, default=None)
    if worst is None or worst.holds:
        return
    from sylvester.backends.onnx.divergence import first_difference

    node = first_difference(program, graphs, worst, made[worst.entry])
    found, expected = f"relative error {worst.error:.2e}", f"at most {worst.tolerance:.0e}"
    first = f"; the first node that differs is {node.name}" if node is not None else ""
    raise ContractBroken(
        f"output {worst.output!r} of graph {worst.entry!r} is not the entry's on {worst.data} inputs: {found}, "
        f"expected {expected} of {worst.dtype}{first}",
        at=node,
    )


def described(agreements: list[Agreement]) -> dict[str, object]:
    """For the report."""
    return {"tolerance": TOLERANCE, "outputs": [asdict(a) for a in agreements]}


def kind_of(entry: Entry) -> str:
    """The coarsest products of an entry."""
    targets = {node.target for node in entry.calls()}
    if targets & QUANTISED:
        return WHOLE
    rounded = (LINEARS | ATTENTIONS) - QUANTISED - EXACT
    return BFLOAT16 if targets & rounded else FLOAT


EXACT = frozenset({torch.ops.aten.linear.default, torch.ops.sylvester.attention.default})


def _unfit(program: Program, entry: Entry) -> str:
    inputs = [binding(n).key for n in entry.placeholders("input")]
    if missing := [key for key in inputs if key not in entry.examples]:
        return f"there is no example of {missing[0]!r}"
    rows = max([int(t.shape[0]) for t in entry.examples.values() if t.ndim] or [1])
    slots = [program.state[binding(n).key] for n in entry.placeholders("state")]
    sizes = [[rows if isinstance(n, torch.SymInt) else n for n in slot.shape] for slot in slots]
    total = sum(int(np.prod(shape)) * slot.dtype.itemsize for shape, slot in zip(sizes, slots, strict=True))
    return f"its caches take {total / 1e9:.1f} GB" if total > LARGEST_STATE else ""


def inputs_of(entry: Entry) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The examples, and as many random values like them; positions stay."""
    yield "example", dict(entry.examples)
    random = torch.Generator().manual_seed(0)
    yield "random", {key: _like(tensor, random) for key, tensor in entry.examples.items()}


def _like(tensor: Tensor, random: torch.Generator) -> Tensor:
    if tensor.ndim == 0:
        return tensor
    if not tensor.is_floating_point():
        return tensor.reshape(-1)[torch.randperm(tensor.numel(), generator=random)].reshape(tensor.shape)
    return torch.randn(tensor.shape, generator=random, dtype=tensor.dtype) * tensor.std(correction=0) + tensor.mean()


def states(program: Program, graphs: Graphs, name: str, inputs: Values) -> State | None:
    """Caches of seeded normal values, at the position that the inputs give."""
    spec = graphs.manifest.entries[name]
    if not spec.states:
        return None
    positions = [s.name for s in spec.inputs if is_position(s, spec)]
    state = graphs.new_state(name, asked(graphs, name, inputs))
    random = torch.Generator().manual_seed(0)
    for key, array in state.arrays.items():
        drawn = torch.randn(array.shape, generator=random).to(program.state[key].dtype)
        array[...] = numpy_of(drawn.view(torch.uint16) if drawn.dtype == torch.bfloat16 else drawn)
    state.position = int(inputs[positions[0]]) if positions else 0
    return state


def asked(graphs: Graphs, name: str, inputs: Values) -> dict[str, NDArray[Any]]:
    spec = graphs.manifest.entries[name]
    return {s.name: numpy_of(inputs[s.name]) for s in spec.inputs if not is_position(s, spec)}


def tensors(program: Program, state: State | None) -> dict[str, Tensor]:
    """Copies of the caches."""
    arrays = {} if state is None else state.arrays
    found = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    return {k: t.view(torch.bfloat16) if program.state[k].dtype == torch.bfloat16 else t for k, t in found.items()}


def _agreements(program: Program, graphs: Graphs, name: str, data: str, inputs: Values) -> Iterator[Agreement]:
    state = states(program, graphs, name, inputs)
    expected = program.run(name, inputs, tensors(program, state))
    found = {k: torch.from_numpy(a) for k, a in graphs.run(name, asked(graphs, name, inputs), state).items()}
    kind = kind_of(program.entries[name])
    for key, tensor in (found | tensors(program, state)).items():
        error = relative_error(expected[key], tensor)
        yield Agreement(name, key, data, kind, error, TOLERANCE[kind])


def nodes_of(entry: Entry) -> list[fx.Node]:
    """The calls that have a tensor of floats or whole numbers."""
    return [n for n in entry.calls() if isinstance(cast(Any, value(n)), Tensor)]
