"""How much memory compiling and running a CPU artefact takes, told before the long work starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from sylvester.backends.memory import LINE, available
from sylvester.backends.tensor_writer import Deferred
from sylvester.codegen.index import Atom, Index, Size, index
from sylvester.compiler.cost import hint
from sylvester.compiler.manifest import EntrySpec, Manifest
from sylvester.compiler.program import Program, value
from sylvester.compiler.sizes import evaluate

WORKING = 40_000_000
"""What compiling takes for pieces of weights and for graphs, the C compiler's own processes aside."""
PROCESS = 45_000_000
"""A process that has loaded numpy, the runtime and the code."""
Slots = Sequence[Sequence[Index]]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `arena` holds activations at the example sizes, `longest_arena` at the longest sequence.

    `compiling` counts what is added to the model given; `running` a whole process, at the example sizes.
    """

    compiling: int
    weights: int
    arena: int
    longest_arena: int
    state: int
    running: int
    longest_running: int

    def notes(self) -> list[str]:
        """Lines for the ledger; one more where this machine has less memory free."""
        told = [
            f"memory while compiling: {_mb(self.compiling)} on top of the model",
            f"memory while running: {_mb(self.running)}, of it weights {_mb(self.weights)}, arena {_mb(self.arena)}, "
            f"state {_mb(self.state)}; at the longest sequence {_mb(self.longest_running)}",
        ]
        free = available()
        needs = {"compiling": self.compiling, "running": self.longest_running}
        short = [f"{work} needs {_mb(need)}, {_mb(free)} are free on this machine" for work, need in needs.items() if need > free]
        return told + short

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def memory_plan(
    program: Program, manifest: Manifest, stored: Mapping[str, Deferred], arenas: Mapping[str, Slots]
) -> MemoryPlan:
    """`arenas`: per entry the sizes of the buffers in each slot. State is that of one call at the example batch."""
    weights = sum(tensor.nbytes for tensor in stored.values())
    given = {name: example_sizes(program, name) for name in manifest.entries}
    longest = {name: given[name] | _longest(spec) for name, spec in manifest.entries.items()}
    arena, longest_arena = (_largest_arena(arenas, sizes) for sizes in (given, longest))
    state = max((_state(manifest, spec, longest[name]) for name, spec in manifest.entries.items()), default=0)
    fixed = PROCESS + weights + state
    return MemoryPlan(
        compiling=WORKING + _made(program) + _largest_whole(stored.values()),
        weights=weights,
        arena=arena,
        longest_arena=longest_arena,
        state=state,
        running=fixed + arena,
        longest_running=fixed + longest_arena,
    )


def example_sizes(program: Program, entry: str) -> dict[str, int]:
    """The symbols in the shapes of an entry's inputs and state, at its example."""
    found = {}
    for node in program.entries[entry].placeholders():
        for size in value(node).shape:
            if not isinstance(size, int):
                found |= {str(s): hint_of(size, s) for s in size.node.expr.free_symbols}
    return found


def hint_of(size: object, symbol: object) -> int:
    """The example value of one symbol of a size."""
    expression = size.node.expr  # type: ignore[attr-defined]
    return hint(size) if expression == symbol else int(size.node.shape_env.var_to_val[symbol])  # type: ignore[attr-defined]


def _longest(spec: EntrySpec) -> dict[str, int]:
    return {symbol.name: symbol.max for symbol in spec.symbols if symbol.max is not None}


def _largest_arena(arenas: Mapping[str, Slots], sizes: Mapping[str, Sizes]) -> int:
    """Entries share one arena."""
    return max((sum(_slot(slot, sizes[name]) for slot in slots) for name, slots in arenas.items()), default=0)


def _slot(buffers: Sequence[Index], sizes: Sizes) -> int:
    values: dict[Atom, Index] = {Size(name): index(n) for name, n in sizes.items()}
    largest = max(buffer.substitute(values).constant or 0 for buffer in buffers)
    return -(-largest // LINE) * LINE
