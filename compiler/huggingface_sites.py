"""Where a program differs from its architecture in ways that a folder can say: rounded weights, norms without scale."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.errors import CompileError, module_path
from sylvester.compiler.huggingface_quantized import Format, Stored, stored_linear, stored_table
from sylvester.compiler.lockstep import Pairs
from sylvester.compiler.program import Entry, Program, binding, is_weight

aten = torch.ops.aten
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
NORMS = (torch.ops.sylvester.rms_norm.default, aten.layer_norm.default)
NEUTRAL = {"weight": 1.0, "bias": 0.0}
"""What a norm without scale or shift has of either."""


@dataclass
class Sites:
    """Found on a walk along both graphs: `quantised` modules with the keys of their tensors by name, and `neutral`
    weights of norms, which the program does without.
    """

    quantised: dict[str, tuple[Format, dict[str, str]]] = field(default_factory=dict)
    neutral: dict[str, float] = field(default_factory=dict)

    def stand_in(self, expected: fx.Node, found: fx.Node) -> Pairs | None:
        """The operands of two such nodes; None where the nodes must be alike."""
        if expected.target is LINEAR and (stored := stored_linear(found)):
            return self._linear(expected, found, stored)
        if expected.target is EMBEDDING and found.target is EMBEDDING and (stored := stored_table(found.args[0])):
            return self._embedding(expected, found, stored)
        if expected.target in NORMS and expected.target is found.target:
            return self._norm(expected, found)
        return None

    def _linear(self, expected: fx.Node, found: fx.Node, stored: Stored) -> Pairs | None:
        here, there = arguments(expected), arguments(found)
        if (here["bias"] is None) != (there["bias"] is None):
            return None
        self._record(expected, here["weight"], stored)
        bias = [(here["bias"], there["bias"])] if here["bias"] is not None else []
        return [(here["input"], there["x"]), *bias]

    def _embedding(self, expected: fx.Node, found: fx.Node, stored: Stored) -> Pairs | None:
        here, there = arguments(expected), arguments(found)
        if any(here[name] != there[name] for name in here if name not in ("weight", "indices", "padding_idx")):
            return None
        self._record(expected, here["weight"], stored)
        return [(here["indices"], there["indices"])]

    def _record(self, node: fx.Node, weight: Any, stored: Stored) -> None:
        """The module that holds the weight is the one that calls the layer."""
        name = module_of(node)
        key = binding(weight).key if is_weight(weight) else ""
        if not (key == f"{name}.weight" or key.startswith(f"{name}.weight.")):
            raise CompileError(
                f"the rounded weight of {name!r} is {key or 'computed'!r} in the architecture, expected its own"
            )
        made = stored.format, {end: binding(own).key for end, own in stored.tensors.items()}
        if self.quantised.setdefault(name, made) != made:
            raise CompileError(f"entries read different rounded weights in {name!r}")

    def _norm(self, expected: fx.Node, found: fx.Node) -> Pairs | None:
        here, there = arguments(expected), arguments(found)
        gone = {name: here[name] for name in NEUTRAL if is_weight(here.get(name)) and there.get(name) is None}
        rest = [name for name in here if name not in gone]
        nodes = [name for name in rest if isinstance(here[name], fx.Node) and isinstance(there[name], fx.Node)]
        if not gone or any(here[name] != there[name] for name in rest if name not in nodes):
            return None
        self.neutral |= {binding(weight).key: NEUTRAL[name] for name, weight in gone.items()}
        return [(here[name], there[name]) for name in nodes]


def module_of(node: fx.Node) -> str:
    """Name of the module that made a node, without the count that torch.export adds to a later call."""
    return re.sub(r"@\d+", "", module_path(node))


def untie(program: Program) -> dict[str, str]:
    """Let modules that share a tensor read it under a name each, so that a walk can tell them apart; returns aliases.

    The name is that of the module with the same end: `lm_head.weight` for a tied head.
    """
    found = dict(program.weights.aliases)
    for name, key in found.items():
        module = name.rpartition(".")[0]
        readers = [(entry, node) for entry in program.entries.values() for node in _readers(entry, key, module)]
        if not readers:
            continue
        del program.weights.aliases[name]
        program.weights[name] = program.weights[key]
        for entry, node in readers:
            weight = next(n for n in entry.placeholders("weight") if binding(n).key == key)
            node.replace_input_with(weight, entry.bind("weight", name, program.weights[name]))
    return found


def _readers(entry: Entry, key: str, module: str) -> list[fx.Node]:
    """The nodes of a module that read a weight."""
    weights = [n for n in entry.placeholders("weight") if binding(n).key == key]
    return [user for weight in weights for user in weight.users if module_of(user) == module]
