"""State slots that nothing needs any more: taken out of every entry, the others renumbered."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from sylvester.compiler.program import Binding, Entry, Output, Program, binding

NUMBERED = re.compile(r"([a-z_]+)(\d+)")


def drop_slots(program: Program, keys: Collection[str]) -> dict[str, str]:
    """Remove slots that are written but not read; returns the new name of each slot that is left.

    Slots are numbered 0..k-1 again, and names such as k3, v3 count the layers that are left.
    """
    left = [key for key in program.state if key not in keys]
    names = _names(left)
    for entry in program.entries.values():
        _drop(entry, keys, names)
    program.state = {names[key]: replace(program.state[key], index=n) for n, key in enumerate(left)}
    return names


def _drop(entry: Entry, keys: Collection[str], names: dict[str, str]) -> None:
    pairs = zip(entry.outputs, entry.results(), strict=True)
    kept = [(o, n) for o, n in pairs if not (o.kind == "state" and o.name in keys)]
    entry.outputs = [Output(o.kind, names[o.name] if o.kind == "state" else o.name) for o, _ in kept]
    entry.graph.output_node().args = (tuple(n for _, n in kept),)
    entry.sweep()
    for node in entry.placeholders("state"):
        node.meta["bind"] = Binding("state", names[binding(node).key])


def _names(keys: Collection[str]) -> dict[str, str]:
    """Names with numbers count from 0 without gaps; names of any other form stay."""
    matches = {key: NUMBERED.fullmatch(key) for key in keys}
    if not all(matches.values()):
        return {key: key for key in keys}
    numbers = sorted({int(match[2]) for match in matches.values() if match})
    return {key: f"{match[1]}{numbers.index(int(match[2]))}" for key, match in matches.items() if match}
