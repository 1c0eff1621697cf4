"""`sylvester.lora`: adapters of low rank on a model that is frozen in 8 bits (LoRA, Hu et al., 2021, on HALO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_graph import MADE_BY, plan, rewrite, turned_in
from sylvester.compiler.halo_module import EXACT, HaloModule, Report, adopt, holder_of, require_saved
from sylvester.compiler.halo_ops import HALO_LINEAR, level_of, rounded_weight
from sylvester.compiler.halo_quantise import format_of
from sylvester.compiler.lora_module import Adapters, Base, LoraModule
from sylvester.compiler.lora_ops import HALO_LORA
from sylvester.compiler.program import Entry, binding
from sylvester.compiler.training_trace import DROPOUT, capture_training

aten = torch.ops.aten


def lora(
    model: nn.Module,
    example_inputs: Any,
    rank: int = 8,
    alpha: float = 16,
    *,
    targets: str | Sequence[str] = (),
    dropout: float = 0.0,
    level: int = 2,
    format: str = "int8",
    head: bool = False,
    simulate: bool = True,
    dynamic: Any = None,
    saved: str = EXACT,
) -> LoraModule:
    """A module that computes the model with frozen weights and trains B A alpha / `rank` beside them.

    The weights of its linear layers are kept only as rounded W R, 1 byte a value, found once; drop the model to free
    its own. `targets` are layers with adapters: names, last parts of names, such as "q_proj", or patterns, such as
    "*.mlp.*"; without, all layers that `halo` rewrites. `dropout` is that of what A reads in training. `level`,
    `format`, `head`, `simulate`, `saved`, example inputs and `dynamic` are as for `halo`. A and B are float32 and the
    only parameters with a gradient; B starts as zeros.

    `module.adapters()`, `save_adapters(folder)` and `load_adapters(folder)` use the names and files of PEFT, and
    `module.merged(model)` gives a state dict of the model. `CompileError` when no layer matches a target.
    """
    _check(model, rank, alpha, dropout)
    level_of(level)
    format_of(format)
    require_saved(saved)
    captured = capture_training(model, example_inputs, dynamic)
    program = captured.program
    found = plan(program, (), head)
    rewrite(program.main, found.chosen, level, format)
    bases, kept = _bases(program.main, model, tuple(dict.fromkeys(linear.key for linear in found.chosen)))
    layers = _targets([base.layer for base in bases.values()], (targets,) if isinstance(targets, str) else targets)
    adapted = Adapters(rank, float(alpha), float(dropout), layers)
    frozen, names = _frozen(model), tuple(model.state_dict())
    for key, base in bases.items():
        _replace(frozen, base, program.weights[key], level, format)
        if base.layer in layers:
            _adapt(frozen, base, rank)
    for node in program.main.calls(HALO_LINEAR):
        if (key := _key(node)) in bases:
            _call(program.main, node, frozen, bases[key], adapted)
    program.main.sweep()
    report = Report(level, format, tuple(bases), found.kept | kept, tuple(program.info["notes"]), saved=saved)
    return LoraModule(frozen, captured, report, simulate, tuple(bases.values()), adapted, names)


def _check(model: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    if isinstance(model, HaloModule):
        raise TypeError("model is what sylvester gave, expected the nn.Module it was made from: they share weights")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is a {type(rank).__name__}, expected a whole number")
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha is {alpha}, expected a number above 0")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected a number from 0 to below 1")


def _bases(entry: Entry, model: nn.Module, keys: Sequence[str]) -> tuple[dict[str, Base], dict[str, str]]:
    """Weights that only linear layers read, by key, and why others stay in float."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    nodes = {binding(node).key: node for node in entry.placeholders("weight")}
    found, kept = dict[str, Base](), dict[str, str]()
    for key in keys:
        weight, turned = everything.get(key), turned_in(nodes[key]) if key in nodes else None
        if weight is None or turned is None:
            kept[key] = "something else than linear layers reads it"
            continue
        names = tuple(name for name, other in everything.items() if other is weight)
        found[key] = Base(names, key.removesuffix(".weight"), weight.dtype, turned)
    if not found:
        raise CompileError("no linear layer can have an adapter", hint=f"why: {kept or 'the model has none'}")
    return found, kept


def _targets(layers: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    unknown = [pattern for pattern in patterns if not any(_matches(layer, pattern) for layer in layers)]
    if unknown:
        raise CompileError(f"no layer matches the targets {unknown}", hint=f"there are {list(layers[:5])} and others")
    return tuple(layer for layer in layers if not patterns or any(_matches(layer, p) for p in patterns))


def _matches(layer: str, pattern: str) -> bool:
    """Whether a pattern is for a layer: for its name or that of its weight, or its last parts, as in PEFT."""
    named = any(fnmatchcase(name, pattern) for name in (layer, f"{layer}.weight"))
    return named or layer.endswith(f".{pattern}")


def _frozen(model: nn.Module) -> nn.Module:
    """A module with the tensors of the model under their names, and without gradients."""
    module, done = nn.Module(), dict[int, nn.Parameter]()
    adopt(module, model)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                same = done.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
                part._parameters[name] = same
    cast(Any, module).forward = model.forward
    return module.train(model.training)


def _replace(module: nn.Module, base: Base, weight: Tensor, level: int, format: str) -> None:
    """The weight goes, under all its names; its rounded values come."""
    for name in base.names:
        holder, last = holder_of(module, name)
        delattr(holder, last)
    matrix = weight.detach().t() if base.turned else weight.detach()
    values, scale = rounded_weight(matrix, level, format, name=base.layer)
    for part, tensor in (("base_values", values), ("base_scale", scale)):
        holder, last = holder_of(module, f"{base.layer}.{part}")
        holder.register_buffer(last, tensor)


def _adapt(module: nn.Module, base: Base, rank: int) -> None:
    """A [rank, in] as PEFT draws it, and B [out, rank] of zeros."""
    values = module.get_buffer(f"{base.layer}.base_values")
    out, features = values.shape
    a, b = torch.empty(rank, features, device=values.device), torch.zeros(out, rank, device=values.device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    for part, tensor in (("lora_A", a), ("lora_B", b)):
        holder, last = holder_of(module, f"{base.layer}.{part}.weight")
        holder.register_parameter(last, nn.Parameter(tensor))


def _key(node: fx.Node) -> str:
    """The weight that a linear reads."""
    weight = cast(fx.Node, node.args[1])
    return binding(weight if weight.op == "placeholder" else weight.all_input_nodes[0]).key


def _call(entry: Entry, node: fx.Node, module: nn.Module, base: Base, adapted: Adapters) -> None:
    """A linear reads rounded values, and its adapters where it has them."""
    x, _, bias, level, format, name = node.args
    tensors = dict(module.named_buffers()) | dict(module.named_parameters())
    keys = [f"{base.layer}.{part}" for part in ("base_values", "base_scale", "lora_A.weight", "lora_B.weight")]
    read = [entry.bind("weight", key, tensors[key].detach()) if key in tensors else None for key in keys]
    other = _dropped(entry, node, cast(fx.Node, x), adapted.dropout) if adapted.dropout and read[-1] else None
    given = (x, *read[:2], bias, *read[2:], level, format, adapted.factor, name, other)
    new = entry.emit(HALO_LORA, *given, before=node, made_by=MADE_BY)
    entry.replace(node, new)


def _dropped(entry: Entry, before: fx.Node, x: fx.Node, share: float) -> fx.Node:
    """x with dropout in training only."""
    node = entry.emit(aten.dropout.default, x, share, False, before=before, made_by=MADE_BY)
    node.meta[DROPOUT] = (x, share, True)
    return node
