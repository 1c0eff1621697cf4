"""`sylvester.halo`: a model that trains with rotated 8-bit products (HALO, Ashkboos et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_graph import plan, rewrite, unmatched
from sylvester.compiler.halo_joint_module import JointModule
from sylvester.compiler.halo_module import EXACT, HaloModule, Report, require_saved
from sylvester.compiler.halo_ops import level_of
from sylvester.compiler.halo_quantise import format_of
from sylvester.compiler.training_trace import capture_training


def halo(
    model: nn.Module,
    example_inputs: Any,
    level: int = 2,
    format: str = "int8",
    *,
    skip: str | Sequence[str] = (),
    head: bool = False,
    simulate: bool = True,
    dynamic: Any = None,
    joint: bool = False,
    saved: str = EXACT,
) -> HaloModule:
    """A module with the same parameters whose linear layers train in `format`: "int8", "fp8" or "int4".

    `level` says which outliers are spread by Hadamard rotations before rounding: 0 none, 1 those of features, 2 those
    of tokens in the gradient of the input as well, 3 also in the gradient of the weights. `skip` are patterns of names
    of parameters whose layers stay as they are; the head, which makes the scores, does unless `head`. Example inputs
    and `dynamic` are as for `trace`. Training mode and dropout are switched by `train()` and `eval()` as usual.

    With `joint`, forward and backward pass are traced as one graph, which is rewritten: rotations of what several
    layers read, or add, are done once. The first call with inputs of each size traces it again. Gradients are the same
    but for rounding.

    `saved` is how norms, activations, attention and products that stay as they are keep their operands and results for
    the backward pass: "exact", or "int8", in groups of 64 values with a scale each, which changes gradients slightly.

    `module.report` says which layers were rewritten, which not and why, and what computes the products: a simulation in
    float where the device does not multiply the format, which without `simulate` is an error of the first call there.
    `CompileError` for a model that cannot be traced for training or has no linear layer left.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module with parameters to train")
    level_of(level)
    format_of(format)
    require_saved(saved)
    _require_own_partition(joint, saved)
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    captured = capture_training(model, example_inputs, dynamic)
    program = captured.program
    if unknown := unmatched(program, patterns):
        names = list(program.weights)
        raise CompileError(f"no weight matches {unknown}", hint=f"there are {names[:5]} and others")
    found = plan(program, patterns, head)
    if not found.chosen:
        why = "; ".join(f"{key}: {reason}" for key, reason in found.kept.items()) or "there is none"
        raise CompileError(f"no linear layer is left to train in {format}: {why}")
    plain = replace(captured, program=program.clone())
    rewrite(program.main, found.chosen, level, format)
    rewritten = tuple(dict.fromkeys(linear.key for linear in found.chosen))
    report = Report(level, format, rewritten, found.kept, tuple(program.info["notes"]), saved=saved)
    if joint:
        return JointModule(model, plain, captured, report, simulate)
    return HaloModule(model, captured, report, simulate)


def _require_own_partition(joint: bool, saved: str) -> None:
    if joint and saved != EXACT:
        raise CompileError(
            "a joint graph keeps what its own partition says, as it is",
            hint='use saved="int8" without joint=True, or joint=True with saved="exact"',
        )
