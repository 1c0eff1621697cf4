"""q, k, v, o, up, gate, down: which layers of repeated blocks correspond and may share weights, found by dataflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import CompileError, module_path
from sylvester.compiler.parts import ATTENTIONS, Part, is_weighted
from sylvester.compiler.program import Entry, Program, binding, is_weight, value
from sylvester.compiler.structure import Stack, discover
from sylvester.passes.split_linears import SplitLinears

LINEAR = torch.ops.aten.linear.default
GATES = (torch.ops.sylvester.swiglu.default, torch.ops.sylvester.geglu.default)
ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("up", "gate", "down")
PART_OF = {"attention": ATTENTION, "cross_attention": ATTENTION, "ffn": FEED_FORWARD}


@dataclass(frozen=True)
class Layer:
    """A linear layer of block number `block` of the program; `node` stands in the main entry, `uses` in all."""

    key: str
    kind: str
    block: int
    path: str
    part: str
    node: fx.Node
    uses: tuple[tuple[Entry, fx.Node], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        n, k = value(arguments(self.node)["weight"]).shape
        return int(n), int(k)


@dataclass(frozen=True)
class Series:
    """Corresponding layers of the blocks of one stack, in order; all of one kind and shape."""

    kind: str
    layers: tuple[Layer, ...]


def require_blocks(program: Program, name: str) -> list[int]:
    """How many blocks each stack has; `CompileError` for a program without repeated blocks."""
    found = [len(stack.blocks) for stack in stacks(program)]
    if not found:
        hint = "trace a model with equal residual blocks, or leave the pass out"
        raise CompileError(f"{name} found no repeated blocks, expected at least 2", hint=hint)
    return found


def require_kinds(option: str, found: object, known: Sequence[str], empty: bool = False) -> tuple[str, ...]:
    """A tuple of names out of `known`; raises TypeError or ValueError."""
    if not isinstance(found, (tuple, list)):
        raise TypeError(f"{option} is {found!r}, expected a tuple of {tuple(known)}")
    if not (found or empty) or not set(found) <= set(known) or len(set(found)) < len(found):
        raise ValueError(f"{option} is {found!r}, expected some of {tuple(known)}, each once")
    return tuple(found)


def main_name(program: Program) -> str:
    return next(name for name, entry in program.entries.items() if entry is program.main)


def stacks(program: Program) -> tuple[Stack, ...]:
    return discover(program, main_name(program)).stacks


def find_series(program: Program, kinds: Sequence[str], changes: Changes) -> list[Series]:
    """The series of these kinds; weights that hold several layers are split first, layers that cannot share refused."""
    split_fused(program, changes)
    found: list[Series] = []
    first = 0
    for stack in stacks(program):
        for place in range(min(len(block.parts) for block in stack.blocks)):
            found += _series(program, stack, first, place, kinds, changes)
        first += len(stack.blocks)
    return found


def split_fused(program: Program, changes: Changes) -> None:
    """Weights that hold several layers of a part become one for each."""
    if any(is_fused(part) for stack in stacks(program) for block in stack.blocks for part in block.parts):
        split = SplitLinears().run(program)
        program.sweep()
        if split.applied:
            changes.note("weights that hold several layers were split, each part has one of its own")


def _series(
    program: Program, stack: Stack, first: int, place: int, kinds: Sequence[str], changes: Changes
) -> Iterator[Series]:
    parts = [block.parts[place] for block in stack.blocks]
    for kind in (k for k in PART_OF.get(parts[0].kind, ()) if k in kinds):
        layers = []
        for number, part in enumerate(parts, first):
            node = _layer(part, kind)
            if node is None:
                continue
            refusal = node if isinstance(node, Refusal) else _refusal(program, node)
            if refusal:
                changes.refuse(kind, refusal, part.writer)
            elif isinstance(node, fx.Node):
                layers.append(_described(program, node, kind, number, stack.blocks[number - first].path, part.kind))
        if layers:
            yield Series(kind, tuple(layers))


def _described(program: Program, node: fx.Node, kind: str, number: int, path: str, part: str) -> Layer:
    key = binding(arguments(node)["weight"]).key
    uses = tuple((program.entry_of(user), user) for user in program.users(key))
    sub = "ffn" if part == "ffn" else "attention"
    return Layer(key, kind, number, path or module_path(node) or str(number), sub, node, uses)


def _layer(part: Part, kind: str) -> fx.Node | Refusal | None:
    """The layer of this kind; None where the part has none, such as a gate."""
    if kind in ("o", "down"):
        return _only(part.writers, kind, part)
    behind = sources(part)
    if isinstance(behind, Refusal):
        return behind
    return _only(behind[kind], kind, part) if kind in behind else None


def sources(part: Part) -> dict[str, tuple[fx.Node, ...]] | Refusal:
    """The layers behind each operand of attention, or of the gate of a feed-forward part."""
    inside = set(part.nodes)
    if part.kind == "ffn":
        gates = [n for n in part.nodes if n.target in GATES]
        if not gates:
            return {"up": part.readers}
        return {kind: _behind(gates[0].args[i], inside) for i, kind in enumerate(("gate", "up"))}
    ops = [n for n in part.nodes if n.target in ATTENTIONS]
    if len(ops) != 1:
        return Refusal(f"the part has {len(ops)} attention ops, expected 1", part.writer)
    return {kind: _behind(ops[0].args[i], inside) for i, kind in enumerate(("q", "k", "v"))}


def _behind(operand: object, inside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nearest layers that an operand is made of."""
    found: dict[fx.Node, None] = {}
    stack = [operand]
    seen: set[object] = set()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node not in inside or node in seen:
            continue
        seen.add(node)
        if is_weighted(node):
            found[node] = None
        else:
            stack += node.all_input_nodes
    return tuple(found)


def _only(nodes: Sequence[fx.Node], kind: str, part: Part) -> fx.Node | Refusal:
    if len(nodes) != 1:
        return Refusal(f"{len(nodes)} layers make {kind}, expected 1", part.writer)
    return nodes[0]


def is_fused(part: Part) -> bool:
    """Whether one layer makes more than one of q, k and v, or gate and up."""
    behind = sources(part) if part.kind in PART_OF else {}
    made = [] if isinstance(behind, Refusal) else [n for nodes in behind.values() for n in nodes]
    return len(made) > len(set(made))


def _refusal(program: Program, node: fx.Node) -> Refusal | None:
    """Why the weight of a layer cannot be replaced."""
    if node.target is not LINEAR:
        return Refusal("a convolution or a layer of low bits, expected a linear layer in float32", node)
    given = arguments(node)
    weight = given["weight"]
    if not is_weight(weight):
        return Refusal("the weight is computed, expected a stored one", node)
    fact, key = value(weight), binding(weight).key
    if fact.dim() != 2 or fact.dtype != torch.float32:
        return Refusal(f"the weight is {fact.dtype}{list(fact.shape)}, expected a float32 matrix", node)
    others = [u for u in program.users(key) if u.target is not LINEAR or arguments(u)["weight"] is not _bound(u, key)]
    if others or any(arguments(u)["input"] is _bound(u, key) for u in program.users(key)):
        return Refusal(f"{key} is read elsewhere too", (others or [node])[0])
    graphs = [user.graph for user in program.users(key)]
    if len(graphs) > len(set(graphs)):
        return Refusal(f"{key} is read by more than one layer", node)
    return None


def _bound(user: fx.Node, key: str) -> fx.Node | None:
    return next((n for n in user.all_input_nodes if is_weight(n) and binding(n).key == key), None)


def total_parameters(series: Iterable[Series]) -> int:
    return sum(n * k for s in series for n, k in (layer.shape for layer in s.layers))
