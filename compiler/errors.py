"""Every error raised on purpose: what was found, what was expected, where, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node


class CompileError(Exception):
    """Base of all deliberate failures; `except CompileError` never hides a bug of ours."""

    def __init__(self, message: str, *, at: Node | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.node = at.name if at is not None else ""
        if at is not None:
            self.add_note(f"at node {at.format_node()}")
            self.add_note(f"from {source_line(at)}")
        if hint:
            self.add_note(f"hint: {hint}")


class TraceError(CompileError):
    """The model cannot be captured as a graph."""


class InvalidProgram(CompileError):
    """A program broke an invariant; the pass named in the notes is to blame."""


class ContractBroken(CompileError):
    """An exact pass changed what the program computes."""


class Unsupported(CompileError):
    """The input is legal but this pass or backend has no way to handle it."""


class ArtefactError(CompileError):
    """A saved artefact is truncated, edited, foreign, or of another format version."""


class InputError(CompileError):
    """A call gave an input of the wrong name, shape, dtype or length."""


class ToolchainMissing(CompileError):
    """No C compiler was found."""


def source_line(node: Node) -> str:
    """The innermost user source line of a node, or its module path when no line is known."""
    trace = str(node.meta.get("stack_trace") or "").strip()
    if trace:
        return " ".join(part.strip() for part in trace.splitlines()[-2:])
    return module_path(node) or "<no source>"


def module_path(node: Node) -> str:
    """Dotted path of the module that made the node, e.g. `model.layers.0.mlp`; empty when unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for name, _ in stack.values():
        path = name
    return str(path)
