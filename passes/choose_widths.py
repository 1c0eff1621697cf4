"""Where fewer bits are also faster: widths that the target runs no faster than the next wider one are not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from sylvester.compiler.calls import arguments
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.recipe import Seconds, Shape

LINEAR = torch.ops.aten.linear.default
Speed = Callable[[Iterable[Shape], Iterable[int]], Seconds]
WIDER = {3: 4, 4: 8, 8: 16}
NAMES = {16: "bfloat16", 8: "int8", 4: "int4", 3: "int3"}


@dataclass(frozen=True)
class Widths:
    """Weights that get more bits than asked for, and what was measured."""

    per_layer: Mapping[str, int]
    notes: tuple[str, ...]


def choose_widths(program: Program, bits: int, speed: Speed) -> Widths:
    """The next wider number for every weight that `bits` would not make faster on the target."""
    shapes = _shapes(program)
    seconds = speed(dict.fromkeys(shapes.values()), (bits, WIDER[bits]))
    per_layer: dict[str, int] = {}
    slower: dict[Shape, list[str]] = {}
    for key, shape in shapes.items():
        if seconds[shape][bits] >= seconds[shape][WIDER[bits]]:
            per_layer[key] = WIDER[bits]
            slower.setdefault(shape, []).append(key)
    ratios = {shape: found[WIDER[bits]] / found[bits] for shape, found in seconds.items()}
    rejected = tuple(
        f"{NAMES[bits]} rejected for {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''} {list(shape)}: "
        f"{ratios[shape]:.2f}x the speed of {NAMES[WIDER[bits]]}"
        for shape, keys in slower.items()
    )
    kept = [ratio for shape, ratio in ratios.items() if shape not in slower]
    faster = (
        (
            f"{NAMES[bits]} kept for {len(kept)} shapes of layers: {min(kept):.2f}-{max(kept):.2f}x the speed of "
            f"{NAMES[WIDER[bits]]}",
        )
        if kept
        else ()
    )
    return Widths(per_layer, (*faster, *rejected))


def _shapes(program: Program) -> dict[str, Shape]:
    """Weights of the linear layers of the main entry."""
    found: dict[str, Shape] = {}
    for node in program.main.calls(LINEAR):
        weight = arguments(node)["weight"]
        if is_weight(weight) and program.weights[binding(weight).key].dim() == 2:
            n, k = program.weights[binding(weight).key].shape
            found[binding(weight).key] = (int(n), int(k))
    return found
