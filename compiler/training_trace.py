"""A model as a Program that trains: gradients stop where they do in the model, and its dropout can be on or off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sylvester.compiler import registry
from sylvester.compiler.check import relative_error
from sylvester.compiler.errors import TraceError
from sylvester.compiler.exported import to_program
from sylvester.compiler.inputs import Examples, Inputs, bind
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Entry, Program
from sylvester.compiler.trace import SAME, as_in_deployment, capture_with, check_weights, exported

aten = torch.ops.aten
EXACT = (torch.float32, torch.float64)
ROUNDED = 0.05
"""Largest difference between two ways to compute the same in 16 bits."""
DROPOUT = "dropout"
"""Key in `meta` of the arguments that a call of dropout has while training."""
DROPOUTS: dict[Any, tuple[int, Any]] = {
    aten.dropout.default: (2, False),
    aten.feature_dropout.default: (2, False),
    aten.alpha_dropout.default: (2, False),
    aten.feature_alpha_dropout.default: (2, False),
    aten.scaled_dot_product_attention.default: (4, 0.0),
}
"""Op -> which argument switches it off, and how."""


@dataclass(frozen=True)
class Form:
    """How a model returns its tensors: `leaves` are None where one stands, else what stands there."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @staticmethod
    def of(returned: Any) -> Form:
        leaves, spec = pytree.tree_flatten(returned)
        return Form(spec, tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves))

    def __deepcopy__(self, _: Any) -> Form:
        return self

    def fill(self, tensors: Iterator[Tensor]) -> Any:
        return pytree.tree_unflatten([next(tensors) if leaf is None else leaf[0] for leaf in self.leaves], self.spec)


@dataclass(frozen=True)
class Captured:
    """`program` has its dropout off; `turned_on` gives it back."""

    program: Program
    form: Form
    inputs: Inputs


def capture_training(model: nn.Module, example_inputs: Examples | None, dynamic: Any = None) -> Captured:
    """Trace a module for training; `TraceError` for one that changes its state or that trains by other arithmetic.

    Modules in training mode are traced in it, or all if the model itself is not.
    """
    inputs = bind(model.forward, example_inputs)
    check_weights(model)
    _refuse_statistics(model)
    training = [m for m in model.modules() if (m.training or not model.training) and not _is_batch_norm(m)]
    with as_in_deployment(model, []), torch.no_grad():
        program = capture_with(partial(_export, training), model, inputs, dynamic)
        args, kwargs = inputs.call()
        returned = model(*args, **kwargs)
        _require_same(program, inputs, returned)
        program = _with_fused_attention(program)
        _require_same(program, inputs, returned)
    return Captured(program, Form.of(returned), inputs)


def _with_fused_attention(program: Program) -> Program:
    """Attention without dropout as one op; the passes would drop what stops gradients, but for this one."""
    program.entries["forward"] = turned_on(program.main)
    program, _ = Pipeline((registry.lookup("passes", "raise-attention")(),), check=False).run(program)
    for node in program.main.calls():
        _turn_off(node)
    return program


def _export(training: list[nn.Module], model: nn.Module, inputs: Inputs, dynamic: Any) -> Program:
    with _flags(training), torch.enable_grad():
        program = to_program(exported(model, inputs, dynamic), inputs.tensors, gradients=True)
    for node in program.main.calls():
        _turn_off(node)
    return program


@contextlib.contextmanager
def _flags(training: list[nn.Module]) -> Iterator[None]:
    """So many modules in training mode, and then none."""
    for module in training:
        module.training = True
    try:
        yield
    finally:
        for module in training:
            module.training = False


def _turn_off(node: fx.Node) -> None:
    if node.target in DROPOUTS:
        place, off = DROPOUTS[node.target]
        if len(node.args) > place and node.args[place]:
            node.meta[DROPOUT] = node.args
            node.args = (*node.args[:place], off, *node.args[place + 1 :])
        elif node.kwargs.get("dropout_p"):
            node.meta[DROPOUT] = node.kwargs
            node.update_kwarg("dropout_p", off)
    elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise TraceError(
            f"training draws random numbers by {node.target}, of which nothing tells how evaluation differs",
            at=node,
            hint="use torch.nn.Dropout, or draw outside of the model and give the numbers as an input",
        )


def turned_on(entry: Entry) -> Entry:
    """The entry with its dropout."""
    found = entry.clone()
    for node in found.calls():
        given = node.meta.get(DROPOUT)
        if isinstance(given, tuple):
            place = DROPOUTS[node.target][0]
            node.args = (*node.args[:place], given[place], *node.args[place + 1 :])
        elif given is not None:
            node.update_kwarg("dropout_p", given["dropout_p"])
    return found


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _refuse_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and getattr(module, "track_running_stats", False) and list(module.buffers(recurse=False)):
            raise TraceError(
                f"{type(module).__name__} {name!r} changes its running statistics while it trains",
                hint=f"freeze them by model.get_submodule({name!r}).eval(), or use a norm that keeps none",
            )


def _require_same(program: Program, inputs: Inputs, returned: Any) -> None:
    """What was traced in training mode computes what the model does in evaluation, but for dropout."""
    expected = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    found = list(program.run("forward", inputs.tensors).values())
    same = len(expected) == len(found) and all(
        relative_error(e, f) < (SAME if e.dtype in EXACT else ROUNDED) for e, f in zip(expected, found, strict=True)
    )
    if not same:
        raise TraceError(
            "in training the model computes something else than in evaluation, apart from dropout",
            hint="forward may not depend on self.training in another way",
        )
