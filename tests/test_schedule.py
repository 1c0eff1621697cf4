"""Which loop steps share a nest, in which order kernels run, and which buffers stay on the stack."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sylvester.codegen.compile import fuse, plans
from sylvester.codegen.emit_loops import private_buffers
from sylvester.codegen.lazy import Plan, Reduce
from sylvester.codegen.schedule import ExternCall, Kernel, LoopNest, schedule
from tests.programs import program

rms_norm = torch.ops.sylvester.rms_norm


def lowered(function: Callable[..., object], *args: Tensor, **weights: Tensor) -> tuple[Plan, list[Kernel]]:
    traced = program(function, *args, weights=weights)
    plan = plans(traced)["forward"]
    fuse(plan, {})
    return plan, schedule(plan)


def private(plan: Plan, kernels: list[Kernel]) -> set[str]:
    touched = {name: sum(name in k.reads | k.writes for k in kernels) for name in plan.buffers}
    return set().union(*(private_buffers(k, plan.buffers, touched) for k in kernels if isinstance(k, LoopNest)))


X = torch.randn(3, 5, 96)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, w: rms_norm(x + y, w, 1e-6),
        lambda x, y, w: (rms_norm(x + y, w, 1e-6), x + y),
        lambda x, y, w: torch.softmax(x * y, -1),
        lambda x, y, w: torch.log_softmax(x, -1) + y,
        lambda x, y, w: torch.nn.functional.layer_norm(x + y, (96,), w, w),
        lambda x, y, w: (x - x.mean(-1, keepdim=True)).relu() * w,
    ],
)
def test_work_on_one_row_is_one_nest(function: Callable[..., object]) -> None:
    _, kernels = lowered(function, X, X.clone(), w=torch.randn(96))

    assert len(kernels) == 1
    assert isinstance(kernels[0], LoopNest)
    assert len(kernels[0].rows) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (y := torch.softmax(x, -1)) + y.flip(0),
        lambda x: torch.softmax(x, -1).flip(1),
        lambda x: torch.softmax(torch.softmax(x, -1), 1),
        lambda x: torch.cumsum(torch.softmax(x, -1), 1),
        lambda x: x.mean(-1, keepdim=True) + x.mean(1, keepdim=True),
    ],
)
def test_a_step_that_reads_another_row_starts_a_nest(function: Callable[..., object]) -> None:
    _, kernels = lowered(function, X)

    assert len(kernels) > 1


def test_order_holds_across_externs() -> None:
    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = torch.nn.functional.linear(x.sin().cos(), a)
        h = torch.softmax(h, -1)
        return torch.nn.functional.linear(h, b) + x

    plan, kernels = lowered(model, X, a=torch.randn(72, 96), b=torch.randn(96, 72))

    assert sum(isinstance(k, ExternCall) for k in kernels) == 2
    written = {b.name for b in plan.buffers.values() if b.kind in ("input", "weight")}
    for kernel in kernels:
        assert kernel.reads <= written | kernel.writes
        written |= kernel.writes


def test_steps_that_nothing_reads_are_left_out() -> None:
    plan, kernels = lowered(lambda x: x.max(-1)[0], X)

    assert sum(isinstance(s, Reduce) for s in plan.steps) == 2
    steps = [m.step for k in kernels if isinstance(k, LoopNest) for m in k.members]
    assert [s.kind for s in steps if isinstance(s, Reduce)] == ["max"]


def test_intermediate_values_of_a_row_are_private() -> None:
    plan, kernels = lowered(lambda x: torch.softmax(x.exp(), -1), X)

    arena = {n for k in kernels for n in k.writes if plan.buffers[n].kind == "arena"}
    assert arena
    assert private(plan, kernels) == arena


def test_values_that_another_kernel_reads_are_not_private() -> None:
    plan, kernels = lowered(lambda x: torch.softmax(torch.softmax(x, -1), 1), X)

    shared = {n for n in plan.buffers if sum(n in k.reads | k.writes for k in kernels) > 1}
    assert shared
    assert not private(plan, kernels) & shared


def test_rows_of_symbolic_length_are_not_private() -> None:
    plan, kernels = lowered(lambda x: torch.softmax(x.exp(), 1), X)

    whole_rows = {n for n in private(plan, kernels) if any(d.constant is None for d in plan.buffers[n].shape[1:2])}
    assert not whole_rows
