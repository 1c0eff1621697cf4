"""Which modules of an architecture are the parts of layers that a program lacks, found from the nodes they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sylvester.compiler.huggingface_quantized import NOTHING, PASSED, REFUSED
from sylvester.compiler.huggingface_sites import module_of
from sylvester.compiler.layers import Layer, find_layers
from sylvester.compiler.ops import kv_update
from sylvester.compiler.program import Program


def absent_modules(whole: Program, model: nn.Module, dropped: Mapping[str, list[int]]) -> dict[str, Any]:
    """`absent` and `passed` of a `quantization_config`, or `refused` with the reason; `whole` has every part.

    Of the modules of a layer that only make nodes of dropped parts, those that write return zeros and the others what
    they get.
    """
    if not dropped:
        return {}
    zeros: list[str] = []
    passed: list[str] = []
    layers = find_layers(whole)
    for number in sorted({n for numbers in dropped.values() for n in numbers}):
        kinds = [kind for kind, numbers in dropped.items() if number in numbers]
        reason = _of_layer(whole, layers[number], kinds, zeros, passed)
        if reason:
            return {REFUSED: reason}
    return {NOTHING: _returned(model, whole.main.examples, zeros), PASSED: passed}


def formats_of_absent(whole: Program, dropped: Mapping[str, list[int]], known: Mapping[str, Any]) -> dict[str, Any]:
    """Formats for modules of layers that lack parts, as other layers have them: layers of one kind stay alike."""
    if not dropped:
        return {}
    paths = [module_of(layer.main.end) for layer in find_layers(whole)]
    ends = {
        name.removeprefix(f"{path}."): form
        for name, form in known.items()
        for path in paths
        if name.startswith(f"{path}.")
    }
    gone = [paths[n] for n in sorted({n for numbers in dropped.values() for n in numbers})]
    return {name: form for path in gone for end, form in ends.items() if (name := f"{path}.{end}") not in known}


def _of_layer(whole: Program, layer: Layer, kinds: Iterable[str], zeros: list[str], passed: list[str]) -> str:
    """Adds the modules of one layer; returns why that is not possible, or nothing."""
    parts = [part for kind in kinds for part, _ in layer.main.of_kind(kind)]
    gone = {node for part in parts for node in part.nodes}
    writing = [node for part in parts for node in part.writers]
    inside = _modules(whole.main.graph.nodes, module_of(layer.main.end))
    alone = {name: nodes for name, nodes in inside.items() if gone.issuperset(nodes)}
    if lost := [node for node in writing if not any(node in nodes for nodes in alone.values())]:
        return f"{module_of(lost[0])!r} in layer {layer.original} makes more than the skipped part"
    for name, nodes in alone.items():
        (zeros if any(node in nodes for node in writing) else passed).append(name)
    return ""


def _modules(nodes: Iterable[fx.Node], layer: str) -> dict[str, set[fx.Node]]:
    """The modules right below a layer and the nodes they make, but for caches."""
    found: dict[str, set[fx.Node]] = {}
    for node in nodes:
        path = module_of(node)
        if node.op == "call_function" and node.target is not kv_update.target and path.startswith(f"{layer}."):
            name = path.removeprefix(f"{layer}.").partition(".")[0]
            found.setdefault(f"{layer}.{name}", set()).add(node)
    return found


def _returned(model: nn.Module, examples: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """What each module returns: 0 for a tensor, else how many items."""
    found: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            found[name] = 0 if isinstance(result, Tensor) else len(result)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        with torch.no_grad():
            model(**examples)
    finally:
        for hook in hooks:
            hook.remove()
    return found
