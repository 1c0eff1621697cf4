"""Capture a PyTorch model as a Program with one entry, `forward`, on the raw graph of torch.export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sylvester.compiler import ops  # noqa: F401  (a .pt2 file may hold dialect ops)
from sylvester.compiler.check import relative_error
from sylvester.compiler.diagnose import explain, first_line, quiet
from sylvester.compiler.errors import CompileError, TraceError
from sylvester.compiler.exported import to_program
from sylvester.compiler.huggingface import facts_of, load_folder
from sylvester.compiler.inputs import Examples, Inputs, automatic, bind, check, fixed_dimensions, same_batch, widenings
from sylvester.compiler.program import Output, Program, binding, value

SAME = 1e-4
Exporter = Callable[[nn.Module, Inputs, Any], Program]


def capture(
    model: nn.Module | ExportedProgram | str | Path, example_inputs: Examples | None = None, *, dynamic: Any = None
) -> Program:
    """Trace a module, an ExportedProgram, a `.pt2` file or a Hugging Face folder.

    `example_inputs` is a tuple (positional) or a dict (keyword) of tensors. `dynamic` None makes every batch and
    sequence dimension symbolic that allows it, else it is torch.export's `dynamic_shapes`. Weights are shared with the
    model, not copied. Raises `TraceError`.
    """
    if isinstance(model, str | Path):
        return _from_path(Path(model), example_inputs, dynamic)
    if isinstance(model, ExportedProgram):
        return _from_exported(model, example_inputs)
    if isinstance(model, nn.Module):
        return _from_module(model, example_inputs, dynamic)
    raise TraceError(f"cannot trace a {type(model).__name__}", hint="give an nn.Module, an ExportedProgram or a path")


def _from_path(path: Path, example_inputs: Examples | None, dynamic: Any) -> Program:
    if path.is_dir():
        model, examples, info = load_folder(path)
        program = _from_module(model, example_inputs or examples, dynamic)
        program.info |= info
        return program
    if not path.exists():
        raise TraceError(f"there is no file or folder {str(path)!r}")
    if path.suffix != ".pt2":
        hint = "expected a Hugging Face folder or a .pt2 file of torch.export.save"
        raise TraceError(f"cannot read {path.name!r}", hint=hint)
    try:
        with quiet():
            found = torch.export.load(path)
    except Exception as error:
        raise TraceError(f"{path.name!r} is not a readable .pt2 file: {first_line(error)}") from error
    return _from_exported(found, example_inputs)


def _from_exported(found: ExportedProgram, example_inputs: Examples | None) -> Program:
    names = [name for name in found.graph_signature.user_inputs if isinstance(name, str)]
    if example_inputs is None:
        example_inputs = tuple(pytree.tree_leaves(found.example_inputs))
    given = example_inputs if isinstance(example_inputs, Mapping) else dict(zip(names, example_inputs, strict=False))
    if set(given) != set(names) or len(example_inputs) != len(names):
        raise TraceError(f"example inputs are {list(given)}, the exported program takes {names}")
    return to_program(found, {name: check(name, given[name]) for name in names})


def _from_module(model: nn.Module, example_inputs: Examples | None, dynamic: Any) -> Program:
    inputs = bind(model.forward, example_inputs)
    check_weights(model)
    notes: list[str] = []
    with as_in_deployment(model, notes), torch.no_grad():
        program = capture_with(_export, model, inputs, dynamic)
    program.info["notes"] = notes + program.info["notes"]
    program.info |= facts_of(model)
    return program


def capture_with(export: Exporter, model: nn.Module, inputs: Inputs, dynamic: Any) -> Program:
    """The program that `export` makes of a model in evaluation mode, with symbolic sizes as for `capture`."""
    return _fixed(export, model, inputs, dynamic) if dynamic is not None else _widest(export, model, inputs)


def _fixed(export: Exporter, model: nn.Module, inputs: Inputs, dynamic: Any) -> Program:
    try:
        return export(model, inputs, dynamic)
    except CompileError:
        raise
    except Exception as error:
        raise explain(error, model, inputs) from error


def _widest(export: Exporter, model: nn.Module, inputs: Inputs) -> Program:
    """The most general capture that works: sizes of 1 are traced with larger ones and then compared with the model."""
    *wider, exact = widenings(inputs)
    for candidate in wider:
        with contextlib.suppress(Exception):
            program = _traced(export, model, candidate)
            program.main.examples = dict(inputs.tensors)
            if _agrees(program, model, inputs):
                return _bounded(program, model, inputs)
    try:
        return _bounded(_traced(export, model, exact), model, inputs)
    except CompileError:
        raise
    except Exception as error:
        raise explain(error, model, inputs) from error


def _traced(export: Exporter, model: nn.Module, inputs: Inputs) -> Program:
    hook = model.register_forward_pre_hook(same_batch(inputs), with_kwargs=True)
    try:
        program = export(model, inputs, automatic(model, inputs))
    finally:
        hook.remove()
    facts = {binding(n).key: value(n) for n in program.main.placeholders("input")}
    program.info["notes"] += fixed_dimensions(inputs, facts)
    return program


def _export(model: nn.Module, inputs: Inputs, dynamic: Any) -> Program:
    return to_program(exported(model, inputs, dynamic), inputs.tensors)


def exported(model: nn.Module, inputs: Inputs, dynamic: Any) -> ExportedProgram:
    args, kwargs = inputs.call()
    with quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)


def _agrees(program: Program, model: nn.Module, inputs: Inputs) -> bool:
    """Same outputs as the model, and every value has the rank of its fact: squeeze() depends on sizes of 1."""
    args, kwargs = inputs.call()
    expected = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    found = list(program.run("forward", inputs.tensors).values())
    same = all(relative_error(e, f) < SAME for e, f in zip(expected, found, strict=True))
    return same and _ranks_hold(program, inputs)


def _bounded(program: Program, model: nn.Module, inputs: Inputs) -> Program:
    """torch.export assumes sizes of at least 2. A model that does something else at 1 keeps that bound, with a note."""
    facts = {binding(n).key: value(n) for n in program.main.placeholders("input")}
    single = {key: _narrowed(tensor, facts[key]) for key, tensor in inputs.tensors.items() if key in facts}
    try:
        same = _agrees(program, model, replace(inputs, tensors={**inputs.tensors, **single}))
    except Exception:
        same = False
    if not same:
        program.info["least_size"] = 2
        program.info["notes"].append("the model differs or fails at size 1: symbolic sizes are at least 2")
    return program


def _narrowed(tensor: Tensor, fact: Tensor) -> Tensor:
    """The tensor cut to 1 along its symbolic dimensions."""
    sizes: tuple[int | torch.SymInt, ...] = tuple(fact.shape)
    for axis, size in enumerate(sizes):
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _ranks_hold(program: Program, inputs: Inputs) -> bool:
    probe = program.clone()
    nodes = [n for n in probe.main.calls() if isinstance(value(n), Tensor)]
    probe.main.graph.output_node().args = (tuple(nodes),)
    probe.main.outputs = [Output("output", n.name) for n in nodes]
    found = probe.run("forward", inputs.tensors)
    return all(found[n.name].ndim == value(n).ndim for n in nodes)


def check_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise TraceError(f"weight {name!r} has no values (meta device)", hint="load the weights before tracing")
        if tensor.device.type != "cpu":
            raise TraceError(f"weight {name!r} is on {tensor.device}, expected cpu", hint="call model.cpu() first")


@contextlib.contextmanager
def as_in_deployment(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Eval mode and no key-value cache of the model's own; both are put back."""
    training = [module for module in model.modules() if module.training]
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if getattr(config, "use_cache", False) is True}
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd) for module in training):
        notes.append("the model was in training mode; it was traced in eval mode")
    for module in training:
        module.training = False
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for config in configs.values():
            config.use_cache = True
