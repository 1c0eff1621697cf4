"""Two launches of one kernel that differ in their memory only become one: keys and values that are written into caches,
queries and keys that are turned to their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sylvester.codegen import gpu_caches, gpu_norms
from sylvester.codegen.gpu_kernel import paired
from sylvester.codegen.gpu_lowering import Given, KernelCall, aligned
from sylvester.codegen.lazy import Plan, Step
from sylvester.codegen.reads import step_reads, step_writes

APART: Mapping[str, tuple[str, ...]] = {"kv_update": gpu_caches.APART, "rope": gpu_norms.APART}
"""By kernel, the arguments that may differ."""


def pair_launches(plan: Plan) -> None:
    """Join launches with the next one that differs in its memory only, where nothing in between needs the first."""
    steps: list[Step | None] = []
    waiting: dict[str, int] = {}
    for step in plan.steps:
        if not isinstance(step, KernelCall) or step.function not in APART:
            steps.append(step)
            continue
        at = waiting.pop(step.function, None)
        first = None if at is None else steps[at]
        if at is not None and isinstance(first, KernelCall) and _alike(first, step) and _free(steps, at):
            steps[at] = None
            steps.append(_paired(first, step))
        else:
            waiting[step.function] = len(steps)
            steps.append(step)
    plan.steps = [step for step in steps if step is not None]


def _given(step: KernelCall) -> Mapping[str, Given]:
    assert step.kernel is not None
    return dict(zip(step.kernel.types, step.given, strict=True))


def _alike(first: KernelCall, second: KernelCall) -> bool:
    """Whether only what may differ does."""
    one, two = _given(first), _given(second)
    same = all(one[name] == two[name] for name in one if name not in APART[first.function])
    kernels = replace(first.kernel, aligned=()) == replace(second.kernel, aligned=())  # type: ignore[type-var]
    apart = not set(first.writes) & {*second.writes, *second.reads}
    return same and kernels and apart and (first.guard, first.when) == (second.guard, second.when)


def _free(steps: list[Step | None], first: int) -> bool:
    """Whether a launch may as well come last: nothing since reads what it writes, or writes what it reads."""
    launch = steps[first]
    assert launch is not None
    later = [step for step in steps[first + 1 :] if step is not None]
    reads, writes = step_reads(launch), step_writes(launch)
    return not any(step_reads(s) & writes or step_writes(s) & (reads | writes) for s in later)


def _paired(first: KernelCall, second: KernelCall) -> KernelCall:
    assert first.kernel is not None
    own, other, apart = _given(first), _given(second), APART[first.function]
    given = {**own, **{f"other_{name}": other[name] for name in apart}}
    kernel, grid = aligned(paired(first.kernel, apart), given), (first.grid[0] + second.grid[0],)
    return replace(
        second, kernel=kernel, given=tuple(given[name] for name in kernel.types), grid=grid,
        writes=(*first.writes, *second.writes), reads=(*first.reads, *second.reads),
        label="; ".join(dict.fromkeys((first.label, second.label))),
    )  # fmt: skip
