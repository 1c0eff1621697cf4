"""What program.json holds, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sylvester.compiler.program import ORIGIN
from sylvester.compiler.symbols import Symbol

FORMAT = 1


@dataclass(frozen=True)
class ModuleSpec:
    """One level of a node's module stack: the exporter's key, the dotted path, the class."""

    key: str
    path: str
    kind: str


@dataclass(frozen=True)
class Origin:
    """Where nodes come from: source line, module stack, the passes that made them."""

    stack_trace: str | None
    modules: tuple[ModuleSpec, ...]
    made_by: tuple[str, ...]

    @staticmethod
    def of(node: fx.Node) -> Origin:
        stack = node.meta.get("nn_module_stack") or {}
        levels = ((str(key), path, getattr(kind, "__name__", str(kind))) for key, (path, kind) in stack.items())
        modules = tuple(ModuleSpec(*level) for level in levels)
        return Origin(node.meta.get("stack_trace"), modules, tuple(node.meta.get("made_by", ())))

    def meta(self) -> dict[str, Any]:
        """The entries of `node.meta` that say this."""
        stack = {module.key: (module.path, module.kind) for module in self.modules}
        return {key: item for key, item in zip(ORIGIN, (self.stack_trace, stack, self.made_by), strict=True) if item}


@dataclass(frozen=True)
class NodeSpec:
    """One call. Arguments are encoded as in encoding.py; `origin` is an index into `Document.origins`."""

    name: str
    target: str
    args: Any
    kwargs: Any
    origin: int


@dataclass(frozen=True)
class PlaceholderSpec:
    name: str
    kind: str
    key: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class OutputSpec:
    kind: str
    name: str
    node: str


@dataclass(frozen=True)
class EntrySpec:
    placeholders: tuple[PlaceholderSpec, ...]
    nodes: tuple[NodeSpec, ...]
    outputs: tuple[OutputSpec, ...]


@dataclass(frozen=True)
class SlotSpec:
    index: int
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Document:
    format: int
    symbols: tuple[Symbol, ...]
    entries: dict[str, EntrySpec]
    state: dict[str, SlotSpec]
    origins: tuple[Origin, ...]
    info: Any
