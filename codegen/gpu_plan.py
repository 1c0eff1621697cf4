"""A program -> per entry the launches of kernels over buffers in one arena, and the kernels by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sylvester.codegen import (  # noqa: F401  (register their lowerings)
    gpu_attention_calls,
    gpu_convolutions,
    gpu_linears,
    gpu_row_calls,
)
from sylvester.codegen.compile import hints_of, in_place
from sylvester.codegen.gpu_architectures import USUAL
from sylvester.codegen.gpu_fusions import fuse
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_loops import loop_kernel
from sylvester.codegen.gpu_lowering import GpuLowering, KernelCall, Others, When
from sylvester.codegen.gpu_pairs import pair_launches
from sylvester.codegen.gpu_products import launch_steps
from sylvester.codegen.index import Index, Size
from sylvester.codegen.lazy import Buffer, Plan, Pointer, Reduce
from sylvester.codegen.lowering import StoredLayers
from sylvester.codegen.memory import Slot, assign, lifetimes
from sylvester.codegen.region import Refused
from sylvester.codegen.schedule import ExternCall, LoopNest, schedule
from sylvester.codegen.sparse_layers import strided_layouts
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.ledger import Fusion
from sylvester.compiler.program import Entry, Program
from sylvester.compiler.stages import DRAFT, stages_of


@dataclass(frozen=True)
class ErrorFlag:
    """The argument through which a kernel reports a position outside of memory, or a division by zero."""


Argument = Pointer | Index | float | ErrorFlag | None


@dataclass(frozen=True)
class Launch:
    """One kernel over `grid` programs. With a `guard` it runs where the number in that buffer is not above 0, with
    `when` at such sizes only. `others`: what it may be tuned over."""

    kernel: Kernel
    grid: tuple[Index, ...]
    arguments: tuple[Argument, ...]
    guard: str = ""
    label: str = ""
    when: When | None = None
    others: Others = field(default=tuple, compare=False)


@dataclass(frozen=True)
class GpuEntry:
    """What one entry runs, in order; buffers of its outputs, and tensors that are stored beside the weights."""

    name: str
    sizes: tuple[Size, ...]
    buffers: Mapping[str, Buffer]
    outputs: tuple[Buffer, ...]
    slots: tuple[Slot, ...]
    launches: tuple[Launch, ...]
    constants: Mapping[str, Tensor]
    fusions: tuple[Fusion, ...] = ()
    notes: tuple[str, ...] = ()


def verifies(program: Program) -> bool:
    """Whether the entries that generate give tokens that are read together the bits of single ones, for drafts."""
    return DRAFT in program.info


def gpu_entries(program: Program, archs: Sequence[str] = USUAL) -> dict[str, GpuEntry]:
    """Every entry for architectures that all run it; `Unsupported` names the ops that no kernel computes."""
    return {name: _entry(name, program, entry, archs) for name, entry in program.entries.items()}


def _entry(name: str, program: Program, entry: Entry, archs: Sequence[str] = USUAL) -> GpuEntry:
    lowering = GpuLowering(name, program, entry, StoredLayers({}, strided_layouts(program), lambda *_: {}))
    lowering.archs = archs
    tree = program.info.get(DRAFT, {}).get("tree", "")
    lowering.steady = verifies(program) and name in {tree, *(stage.entry for stage in stages_of(program.info))}
    lowering.trees = lowering.steady and bool(tree)
    plan = lowering.run()
    outputs = tuple(in_place(plan, b) for b in plan.of_kind("output"))
    fused = fuse(plan, hints_of(entry))
    launch_steps(lowering)
    pair_launches(plan)
    kernels = schedule(plan)
    private = _numbers(plan, [k for k in kernels if isinstance(k, LoopNest)], kernels)
    slots = assign(lifetimes(kernels, plan.buffers, private), plan.buffers, hints_of(entry))
    launches = [_launch(kernel, plan, private) for kernel in kernels]
    return GpuEntry(
        name, plan.sizes, plan.buffers, outputs, tuple(slots), tuple(launches), lowering.constants, tuple(fused),
        tuple(lowering.notes),
    )  # fmt: skip


def _numbers(plan: Plan, nests: Sequence[LoopNest], kernels: Sequence[LoopNest | ExternCall]) -> set[str]:
    """Results of reductions to one number a row that only their nest touches: those stay in registers."""
    touched: dict[str, int] = {}
    for kernel in kernels:
        for name in kernel.reads | kernel.writes:
            touched[name] = touched.get(name, 0) + 1
    members = [m for nest in nests for m in nest.members if isinstance(m.step, Reduce) and not m.extra]
    return {
        m.step.buffer for m in members if touched[m.step.buffer] == 1 and plan.buffers[m.step.buffer].kind == "arena"
    }


def _launch(kernel: LoopNest | ExternCall, plan: Plan, private: set[str]) -> Launch:
    if isinstance(kernel, ExternCall):
        step = kernel.step
        if not isinstance(step, KernelCall) or step.kernel is None:
            raise Unsupported(
                f"cuda has no kernel for {step.label or step.function}",
                hint="compile with target='cpu', or run with target='reference'",
            )
        return Launch(step.kernel, step.grid, step.given, step.guard, step.label, step.when, step.others)
    label = "; ".join(dict.fromkeys(m.step.label for m in kernel.members if m.step.label))
    try:
        made = loop_kernel(kernel, plan.buffers, private)
    except Refused as cause:
        raise Unsupported(f"cuda has no form for {cause} in {label}", hint="compile with target='cpu'") from cause
    pointers = [Pointer(name, Index(()), plan.buffers[name].dtype) for name in made.buffers]
    sizes = [Index((((size,), 1),)) for size in made.sizes]
    flag = [ErrorFlag()] if made.checks else []
    return Launch(made.kernel, (made.grid,), (*pointers, *sizes, *flag), kernel.guard, label)
