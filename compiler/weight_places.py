"""Which layers and parts read each weight: for reports on passes that change weights, found from structure."""

from __future__ import annotations

from collections.abc import Iterable

from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import find_layers
from sylvester.compiler.program import Program, binding, is_weight

Place = tuple[str, str]
"""A layer's module path, and "attention" or "ffn"."""
ATTENTION, FFN = "attention", "ffn"


def weight_places(program: Program) -> dict[str, list[Place]]:
    """Weight key -> the places that read it; empty for a program without layers, several for a shared weight."""
    try:
        layers = find_layers(program)
    except CompileError:
        return {}
    found: dict[str, list[Place]] = {}
    for layer in layers:
        for kind in (ATTENTION, FFN):
            nodes = (node for part, _ in layer.main.of_kind(kind) for node in part.nodes)
            keys = (binding(u).key for node in nodes for u in node.all_input_nodes if is_weight(u))
            for key in dict.fromkeys(keys):
                found.setdefault(key, []).append((layer.path, kind))
    return found


def record(changes: Changes, places: dict[str, list[Place]], done: Iterable[tuple[str, str]]) -> None:
    """Say what each part became, given (weight key, what) pairs; different words for its weights are joined by "/"."""
    words: dict[Place, list[str]] = {}
    for key, what in done:
        for place in places.get(key, ()):
            words.setdefault(place, []).append(what)
    for (layer, part), texts in words.items():
        changes.became(layer, part, "/".join(dict.fromkeys(texts)))
