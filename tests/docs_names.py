"""What reading a block of Python tells without running it: names, attributes, and arguments against signatures."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

import sylvester as sv
from tests.docs_pages import Block

DEFINED = (ast.ClassDef, ast.FunctionDef)


class Names:
    """What static reading knows of a page: values, the classes of what calls return, and names bound anywhere."""

    def __init__(self, values: dict[str, Any], page: Sequence[Block]) -> None:
        self.values, self.classes = values, dict[str, type]()
        self.bound = {name for block in page if block.language == "python" for name in _bound(block)}

    def check(self, block: Block) -> None:
        """Raise what is wrong about names, attributes and arguments."""
        for statement in ast.parse(block.text).body:
            self._imports(statement)
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    known = self.bound | self.values.keys() | self.classes.keys() | vars(builtins).keys()
                    assert node.id in known, f"{block.place}: {node.id} is not defined on this page"
                elif isinstance(node, ast.Call):
                    self._check_call(block, node)
                elif isinstance(node, ast.Attribute):
                    self._resolve(node)
            self._assign(statement)

    def _imports(self, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), "page", "exec"), self.values)

    def _assign(self, statement: ast.stmt) -> None:
        if not isinstance(statement, ast.Assign):
            return
        kind = self._class_of(statement.value)
        for target in statement.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.classes[name.id] = kind or object

    def _class_of(self, node: ast.expr) -> type | None:
        if isinstance(node, ast.Name):
            return self.classes.get(node.id)
        if not isinstance(node, ast.Call):
            return None
        function = self._resolve(node.func)
        if isinstance(function, type):
            return function
        stated = getattr(function, "__annotations__", {}).get("return")
        return getattr(sv, stated) if stated in sv.__all__ else None

    def _resolve(self, node: ast.expr) -> Any:
        """The function, class or module that an expression names; None when reading does not tell."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id) if node.id not in self.classes else None
        if not isinstance(node, ast.Attribute):
            return None
        owner = self._class_of(node.value) or self._resolve(node.value)
        if owner is None or owner is object:
            return None
        fields = getattr(owner, "__dataclass_fields__", {}) if isinstance(owner, type) else {}
        if isinstance(owner, type) and (node.attr in fields or node.attr in getattr(owner, "__annotations__", {})):
            return None
        assert hasattr(owner, node.attr), f"{owner} has no {node.attr}"
        return getattr(owner, node.attr)

    def _check_call(self, block: Block, node: ast.Call) -> None:
        function = self._resolve(node.func)
        if function is None or any(isinstance(a, ast.Starred) for a in node.args):
            return
        try:
            signature = inspect.signature(function)
        except ValueError:
            return
        bound = isinstance(node.func, ast.Attribute) and self._class_of(node.func.value) is not None
        given = [None] * (len(node.args) + (bound and inspect.isfunction(function)))
        try:
            signature.bind(*given, **{k.arg: None for k in node.keywords if k.arg})
        except TypeError as error:
            raise AssertionError(f"{block.place}: {ast.unparse(node)}: {error}") from error


def _bound(block: Block) -> set[str]:
    """Names that a block gives a meaning."""
    if block.mark.startswith(("output", "signature")):
        return set()
    nodes = list(ast.walk(ast.parse(block.text)))
    named = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return named | {n.arg for n in nodes if isinstance(n, ast.arg)} | {n.name for n in nodes if isinstance(n, DEFINED)}


def check_signature(block: Block) -> None:
    """The parameters and defaults are those of the function that the mark names."""
    module, _, name = block.mark.split()[1].partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    arguments = re.fullmatch(r"[\w.]+\((.*)\)", block.text.strip(), re.DOTALL)
    assert arguments, f"{block.place} is no call"
    scope: dict[str, Any] = {}
    exec(f"def stated({arguments[1]}): ...", scope)

    def plain(parameters: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in parameters.values() if p.name != "self"]

    stated, actual = plain(inspect.signature(scope["stated"]).parameters), plain(inspect.signature(function).parameters)
    assert stated == actual, f"{block.place}: {name} takes {actual}"
