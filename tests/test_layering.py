"""The architecture as a table: who may import whom, what loads without torch, who reads the environment, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "compiler": set(),
    "codegen": {"compiler"},
    "passes": {"compiler"},
    "backends": {"compiler", "codegen"},
    "sylvester": {"compiler", "codegen", "passes", "backends"},
}
LAZY = "compiler/driver.py"  # the one inner file that reaches everything, from inside functions
READS_ENVIRONMENT = "compiler/knobs.py"
WITHOUT_TORCH = (
    "sylvester",
    "sylvester.compiler.errors",
    "sylvester.compiler.knobs",
    "sylvester.compiler.manifest",
    "sylvester.compiler.target",
    "sylvester.backends.cpu_runtime",
    "sylvester.backends.cuda.runtime",
    "sylvester.backends.onnx.runtime",
)
MAX_LINES = 400

FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
ALL_FILES = FILES + [path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> list[str]:
    """compiler/x.py is ["sylvester", "compiler", "x"]; a package is named by its folder."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "sylvester" else ["sylvester", *parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def absolute(node: ast.ImportFrom, path: Path) -> list[str]:
    """The module named by `from ... import`, with leading dots resolved from the package of `path`."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    return base + (node.module.split(".") if node.module else [])


def imported(node: ast.AST, path: Path) -> Iterator[list[str]]:
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ([*absolute(node, path), alias.name] for alias in node.names)


def folders(nodes: Iterator[ast.AST], path: Path) -> set[str]:
    """Our folders that the import statements among `nodes` reach; the front door is the folder sylvester."""
    ours = [parts for node in nodes for parts in imported(node, path) if parts[0] == "sylvester"]
    return {parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "sylvester" for parts in ours}


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def illegal_imports(source: str, path: Path) -> set[str]:
    tree = ast.parse(source)
    folder = path.relative_to(ROOT).parts[0]
    nodes = outside_functions(tree) if name(path) == LAZY else ast.walk(tree)
    return folders(nodes, path) - MAY_IMPORT[folder] - {folder}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path: Path) -> None:
    illegal = illegal_imports(path.read_text(), path)

    assert not illegal, f"{name(path)} must not import {sorted(illegal)}"


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("passes/a.py", "import sylvester.backends.cpu", {"backends"}),
        ("passes/a.py", "def f():\n    from sylvester.backends import cpu", {"backends"}),
        ("passes/a.py", "from ..codegen import space", {"codegen"}),
        ("passes/__init__.py", "from ..codegen import space", {"codegen"}),
        ("codegen/a.py", "from .. import passes", {"passes"}),
        ("compiler/a.py", "import sylvester", {"sylvester"}),
        ("compiler/a.py", "from sylvester import passes", {"passes"}),
        ("compiler/a.py", "from . import errors", set()),
        ("backends/a.py", "from sylvester.codegen.space import Space\nimport torch", set()),
        ("compiler/driver.py", "def f():\n    import sylvester.passes", set()),
        ("compiler/driver.py", "import sylvester.passes", {"passes"}),
    ],
)
def test_import_check_sees(file: str, source: str, found: set[str]) -> None:
    assert illegal_imports(source, ROOT / file) == found


def exists(module: str) -> bool:
    return any(".".join(module_of(path)) == module for path in FILES)


@pytest.mark.parametrize("module", [module for module in WITHOUT_TORCH if exists(module)])
def test_loads_without_torch(module: str) -> None:
    code = f"import {module}, sys; print(*{{'torch', 'transformers', 'networkx'}} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.split() == []


def environment_reads(source: str) -> list[int]:
    """Line numbers of os.environ, os.environb, os.getenv and of imports of these names from os."""
    names = {"environ", "environb", "getenv", "putenv"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        by_attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
        by_import = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
        lines += [node.lineno] if by_attribute or by_import else []
    return sorted(lines)


@pytest.mark.parametrize("path", [path for path in FILES if name(path) != READS_ENVIRONMENT], ids=name)
def test_environment_is_read_in_one_file(path: Path) -> None:
    lines = environment_reads(path.read_text())

    assert not lines, f"{name(path)} reads the environment in lines {lines}: declare a knob in {READS_ENVIRONMENT}"


def test_environment_check_sees() -> None:
    assert environment_reads("import os\nos.environ['A']\nfrom os import getenv\nos.path") == [2, 3]


def test_files_stay_small() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in ALL_FILES}
    totals: Counter[str] = Counter()
    for path, count in lines.items():
        totals[path.relative_to(ROOT).parts[0]] += count

    long = {name(path): count for path, count in lines.items() if count > MAX_LINES}

    assert not long, f"over {MAX_LINES} lines: {long}; lines per folder: {dict(totals)}"
