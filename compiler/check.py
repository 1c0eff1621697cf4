"""The numerical check of exact passes: run every entry on its examples before and after, compare output by output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, fx

from sylvester.compiler.cache_ops import kv_update_q, quantize_records
from sylvester.compiler.cost import hint
from sylvester.compiler.errors import ContractBroken
from sylvester.compiler.program import Entry, Program, binding, value
from sylvester.compiler.quantized_ops import QUANTISED

TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 1e-2}
TIGHT = 1e-4
ROUNDED = 0.05
"""Where rows are rounded to whole numbers: the last bit of a sum decides which way, and every layer adds to that."""
STANDS_FOR = {"prefill": "forward"}

Results = dict[str, dict[str, Tensor]]
"""Entry name -> output name -> value."""


@dataclass(frozen=True)
class Difference:
    """Where two runs differ most. `error` is max |after - before| over max |before|."""

    entry: str
    output: str
    error: float
    tolerance: float


Bases = Mapping[str, Callable[[Tensor], Tensor]]
"""State slot -> what the content it had means in the basis it has now."""
SAME: Bases = MappingProxyType({})


def evaluate(program: Program, bases: Bases = SAME) -> Results:
    """Outputs of every entry that has an example for each of its inputs; states are random but always the same."""
    return {
        name: program.run(name, entry.examples, random_state(program, entry, bases))
        for name, entry in program.entries.items()
        if entry.examples
    }


def random_state(program: Program, entry: Entry, bases: Bases = SAME) -> dict[str, Tensor]:
    """Seeded normal values for the state slots, put into their bases, or nothing for an entry without state."""
    if not entry.placeholders("state"):
        return {}
    random = torch.Generator().manual_seed(0)
    tokens = _tokens_needed(entry)
    used = {binding(n).key for n in entry.placeholders("state")}
    slots = {name: slot for name, slot in program.state.items() if name in used}
    shapes = {name: tuple(hint(n) for n in slot.shape) for name, slot in slots.items()}
    batch = {name: _batch(entry, slot.shape[0]) for name, slot in slots.items()}
    shapes = {name: (batch[name], shape[1], min(tokens, shape[2]), *shape[3:]) for name, shape in shapes.items()}
    made = {
        name: _random_records(entry, name, shape, random, bases.get(name, lambda x: x))
        for name, shape in shapes.items()
    }
    return {name: made[name].to(program.state[name].dtype) for name in shapes}


def _random_records(
    entry: Entry, key: str, shape: tuple[int, ...], random: torch.Generator, basis: Callable[[Tensor], Tensor]
) -> Tensor:
    """Normal values, quantised where the entry writes records into the slot."""
    update = next(u for n in entry.placeholders("state") if binding(n).key == key for u in n.users)
    if update.target is not kv_update_q.target:
        return basis(torch.randn(shape, generator=random))
    width, bits = hint(value(cast(fx.Node, update.args[1])).shape[-1]), cast(int, update.args[3])
    return quantize_records(basis(torch.randn((*shape[:-1], width), generator=random)), bits)


def _batch(entry: Entry, size: int | torch.SymInt) -> int:
    """The batch of the examples, where a slot takes any."""
    if isinstance(size, int):
        return size
    return next(int(t.shape[0]) for t in entry.examples.values() if t.ndim > 1)


def _tokens_needed(entry: Entry) -> int:
    """Cache rows that a run of the example touches: plain PyTorch takes a cache that is just long enough."""
    past = sum(int(t) for t in entry.examples.values() if t.ndim == 0)
    return past + max(t.shape[1] for t in entry.examples.values() if t.ndim > 1)


def moved(results: Results, bases: Bases) -> Results:
    """Results with the contents of state slots put into other bases."""
    return {
        entry: {name: bases[name](value) if name in bases else value for name, value in outputs.items()}
        for entry, outputs in results.items()
    }


def rounds(program: Program) -> bool:
    """Whether the program was read from a folder of rounded weights, and its layers round the rows they read.

    Then exact passes that raise it meet rows that are rounded already, on either side of them.
    """
    read = (program.info.get("config") or {}).get("quantization_config")
    return bool(read) and any(entry.calls(*QUANTISED) for entry in program.entries.values())


def largest_difference(before: Results, after: Results, least: float = 0.0) -> Difference | None:
    """The worst output relative to its tolerance, which is `least` at least.

    Entries are compared by name, a new `prefill` with `forward`.
    """
    found = []
    for name, outputs in after.items():
        source = name if name in before else STANDS_FOR.get(name, name)
        found += _differences(name, before.get(source, {}), outputs, least)
    return max(found, key=lambda d: d.error / d.tolerance, default=None)


def require_same(before: Results, after: Results, least: float = 0.0) -> float | None:
    """The largest relative error, None when nothing can be compared; raises `ContractBroken` above the tolerance."""
    worst = largest_difference(before, after, least)
    if worst is None:
        return None
    if not worst.error <= worst.tolerance:
        found, expected = f"relative error {worst.error:.2e}", f"at most {worst.tolerance:.0e}"
        raise ContractBroken(f"output {worst.output!r} of entry {worst.entry!r} changed: {found}, expected {expected}")
    return worst.error


def _differences(
    entry: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], least: float
) -> list[Difference]:
    names = [name for name in after if name in before]
    return [
        Difference(
            entry,
            name,
            relative_error(before[name], after[name]),
            max(least, TOLERANCE.get(before[name].dtype, TIGHT)),
        )
        for name in names
    ]


def relative_error(before: Tensor, after: Tensor) -> float:
    """Max |after - before| over max finite |before|; infinite when shapes, types or non-finite places differ."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.inf
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else math.inf
    finite = before.isfinite()
    same_elsewhere = torch.allclose(before[~finite], after[~finite], equal_nan=True)
    if not same_elsewhere or not after[finite].isfinite().all():
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(before[finite].abs().max()) or 1.0
    return float((after[finite].float() - before[finite].float()).abs().max()) / scale
