"""The IR: a Program is weights, state and entries; an Entry is one fx graph of ATen and dialect ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.node import Target, map_arg

from sylvester.compiler.calibration import Calibration
from sylvester.compiler.errors import CompileError, InvalidProgram
from sylvester.compiler.ops import FACTS
from sylvester.compiler.weights import ParameterStore

if TYPE_CHECKING:
    import networkx

Kind = Literal["input", "weight", "state"]
ORIGIN = ("stack_trace", "nn_module_stack", "made_by")


@dataclass(frozen=True)
class Binding:
    """What a placeholder stands for."""

    kind: Kind
    key: str


@dataclass(frozen=True)
class Output:
    """What a graph output is: a value for the caller, or the next value of a state slot."""

    kind: Literal["output", "state"]
    name: str


@dataclass(frozen=True)
class StateSlot:
    """A value that lives across calls. `shape` may hold symbolic sizes; slots are numbered densely by `index`."""

    index: int
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype


@dataclass
class Entry:
    """One functional graph. Placeholders carry `meta["bind"]`, every node carries `meta["val"]`."""

    graph: fx.Graph
    outputs: list[Output]
    examples: dict[str, Tensor] = field(default_factory=dict)

    def placeholders(self, kind: Kind | None = None) -> list[fx.Node]:
        nodes = self.graph.find_nodes(op="placeholder")
        return [n for n in nodes if kind is None or binding(n).kind == kind]

    def calls(self, *targets: Target) -> list[fx.Node]:
        """Op nodes in order, all of them or those with one of `targets`."""
        return [n for n in self.graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]

    def results(self) -> list[fx.Node]:
        return list(cast("Sequence[fx.Node]", self.graph.output_node().args[0]))

    def result(self, name: str) -> fx.Node:
        names = [o.name for o in self.outputs]
        if name not in names:
            raise CompileError(f"no output named {name!r}", hint=f"the entry has {names}")
        return self.results()[names.index(name)]

    @property
    def fake_mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            if isinstance(node.meta.get("val"), FakeTensor):
                return cast(FakeTensorMode, node.meta["val"].fake_mode)
        raise InvalidProgram("no node carries a tensor fact", hint="build entries with sylvester.trace")

    def emit(
        self, target: Callable[..., Any], *args: Any, before: fx.Node, made_by: str = "", **kwargs: Any
    ) -> fx.Node:
        """Insert a call with its tensor fact; origin is inherited from `before`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: before.meta[k] for k in ORIGIN if k in before.meta}
        if made_by:
            node.meta["made_by"] = (*node.meta.get("made_by", ()), made_by)
        node.meta["val"] = self.fact(target, args, kwargs)
        return node

    def fact(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The fake value of a call: shapes with symbols, dtype."""
        compute: Callable[..., Any] = FACTS.get(target, target)
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            return compute(*map_arg(args, value), **map_arg(dict(kwargs), value))

    def bind(self, kind: Kind, key: str, like: Tensor) -> fx.Node:
        """The placeholder of `key`, made when there is none yet."""
        for node in self.placeholders(kind):
            if binding(node).key == key:
                return node
        existing = self.placeholders()
        with self.graph.inserting_before(existing[-1].next if existing else next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"{kind}_{key}".replace(".", "_"))
        node.meta["bind"] = Binding(kind, key)
        node.meta["val"] = like if isinstance(like, FakeTensor) else fake_like(self.fake_mode, like)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """All users of `old` use `new`; `old` and what only it used disappear with the next `sweep`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def sweep(self) -> int:
        """Erase calls and weight or state placeholders that nothing uses; returns how many."""
        dead = 0
        for node in reversed(list(self.graph.nodes)):
            disposable = node.op == "call_function" or (node.op == "placeholder" and binding(node).kind != "input")
            if disposable and not node.users:
                self.graph.erase_node(node)
                dead += 1
        return dead

    def clone(self) -> Entry:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, copies))
        for old, new in copies.items():
            new.meta = dict(old.meta)
        graph.output_node().meta = dict(self.graph.output_node().meta)
        return Entry(graph, list(self.outputs), dict(self.examples))


@dataclass
class Program:
    """Entries over one weight store and one set of state slots. Passes edit a clone; tensors are shared, never mutated.

    `info` holds facts about the model that shape no graph: `max_length`, `tokenizer` (a path), `eos_token_ids`,
    `output_type`, `notes`. `calibration` is data that passes may measure on; it is not saved.
    """

    weights: ParameterStore
    entries: dict[str, Entry]
    state: dict[str, StateSlot] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    @property
    def main(self) -> Entry:
        """The entry that computes what the model's forward computed."""
        return self.entries["forward"] if "forward" in self.entries else next(iter(self.entries.values()))

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CompileError(f"no entry named {name!r}", hint=f"the program has {list(self.entries)}")
        return self.entries[name]

    def entry_of(self, node: fx.Node) -> Entry:
        """The entry whose graph holds the node."""
        return next(entry for entry in self.entries.values() if entry.graph is node.graph)

    def users(self, key: str) -> list[fx.Node]:
        """The nodes that read a weight, in every entry."""
        nodes = (n for entry in self.entries.values() for n in entry.placeholders("weight"))
        return [user for node in nodes if binding(node).key == key for user in node.users]

    def clone(self) -> Program:
        entries = {name: entry.clone() for name, entry in self.entries.items()}
        return Program(self.weights.clone(), entries, dict(self.state), deepcopy(self.info), self.calibration)

    def sweep(self) -> int:
        """Dead code in every entry, then weights no entry uses."""
        dead = sum(entry.sweep() for entry in self.entries.values())
        used = {binding(n).key for entry in self.entries.values() for n in entry.placeholders("weight")}
        for key in [key for key in self.weights if key not in used]:
            del self.weights[key]
        return dead

    def run(
        self, entry: str, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Execute an entry in plain PyTorch; returns outputs and new state by name."""
        chosen = self.entry(entry)
        sources: dict[str, Mapping[str, Tensor]] = {"input": inputs, "weight": self.weights, "state": state or {}}
        arguments = [_lookup(sources[binding(n).kind], binding(n)) for n in chosen.placeholders()]
        with torch.no_grad():
            results = fx.GraphModule(torch.nn.Module(), chosen.graph)(*arguments)
        return {output.name: result for output, result in zip(chosen.outputs, results, strict=True)}

    def save(self, folder: str | Path) -> None:
        """Write graphs, weights and examples to a folder; see compiler/serialize.py."""
        from sylvester.compiler import serialize

        serialize.save(self, folder)

    @staticmethod
    def load(folder: str | Path) -> Program:
        """Read what `save` wrote; `ArtefactError` names a file that is truncated, edited or foreign."""
        from sylvester.compiler import serialize

        return serialize.load(folder)

    def export_hf(self, folder: str | Path, *, stock: bool = False) -> Path:
        """Write a Hugging Face folder with the parts and weights that are left; see compiler/huggingface_export.py."""
        from sylvester.compiler import huggingface_export

        return huggingface_export.export(self, folder, stock=stock)

    def rewrite(self, passes: Any, calibration: Any = None) -> Program:
        """The program after passes and recipes, given as to `compile`; this one stays as it is.

        Recipes choose without timing the target. Every pass is verified; one that breaks its contract is an error.
        """
        from sylvester.compiler import resolve, samples
        from sylvester.compiler.pipeline import Pipeline

        program = self.clone()
        if (given := samples.listed(calibration)) is not None:
            program.calibration = samples.parse(program, given)
        return Pipeline(resolve.expand(resolve.resolve_passes(passes), program, None).passes)(program)

    def to_networkx(self) -> networkx.MultiDiGraph[str]:
        """Every op, input and weight as a node of one graph; see compiler/graph_steps.py."""
        from sylvester.compiler.graph_steps import to_networkx

        return to_networkx(self)

    def nodes(self) -> Iterator[tuple[str, fx.Node]]:
        for name, entry in self.entries.items():
            yield from ((name, node) for node in entry.graph.nodes)

    def __str__(self) -> str:
        from sylvester.compiler.printing import render

        return render(self)


def _lookup(source: Mapping[str, Tensor], bound: Binding) -> Tensor:
    if bound.key not in source:
        raise CompileError(f"missing {bound.kind} {bound.key!r}", hint=f"given were {sorted(source)[:20]}")
    return source[bound.key]


def binding(node: fx.Node) -> Binding:
    return cast(Binding, node.meta["bind"])


def is_weight(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and binding(node).kind == "weight"


def value(node: fx.Node) -> Any:
    """The fact of a node: a fake tensor, a symbolic size, or a tuple of them."""
    return node.meta["val"]


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    with mode:
        return cast(FakeTensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))


def fake_empty(mode: FakeTensorMode, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> FakeTensor:
    with mode:
        return cast(FakeTensor, torch.empty(cast("tuple[int, ...]", tuple(shape)), dtype=dtype))
