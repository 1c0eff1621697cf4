"""What the commands print: tables, JSON, and progress on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from sylvester.compiler.progress import Progress, silent


def emit(facts: object, text: str, as_json: bool) -> None:
    """The JSON value, or the text. JSON has no word for NaN and infinities: they become null."""
    print(json.dumps(_finite(facts), allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns under the keys of the first row; floats with four digits."""
    if not rows:
        return "nothing"
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows in runs that have the same columns."""
    return [list(group) for _, group in groupby(rows, key=list)]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def watched(wanted: bool) -> Iterator[Progress]:
    """A progress bar on the terminal's error stream; silent elsewhere."""
    if not wanted or not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:24}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=1)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def pass_rows() -> list[dict[str, str]]:
    """Name, contract and first line of the documentation of every registered pass, and what each recipe stands for."""
    from sylvester.compiler.recipe import Recipe
    from sylvester.compiler.registry import resolve, table

    rows = []
    for name, place in sorted(table("passes").items()):
        cls = resolve(place)
        rows.append({"pass": name, "contract": str(cls.contract), "does": _first_line(cls)})
    for name, place in sorted(table("recipes").items()):
        recipe = resolve(place)
        does = recipe.summary() if isinstance(recipe, Recipe) else ", ".join(map(str, recipe))
        rows.append({"pass": name, "contract": "recipe", "does": does})
    return rows


def _first_line(cls: type) -> str:
    """Of the class, else of its module: a dataclass without a docstring has its signature there."""
    own = cls.__doc__ or ""
    text = sys.modules[cls.__module__].__doc__ if not own or own.startswith(f"{cls.__name__}(") else own
    return (text or "").strip().splitlines()[0]


def artefact_facts(folder: Path) -> tuple[dict[str, Any], str]:
    from sylvester.compiler.artefact import describe
    from sylvester.compiler.manifest import read_verified

    manifest = read_verified(folder)
    files = [{"file": name, "bytes": spec.bytes} for name, spec in manifest.files.items()]
    return json.loads(manifest.to_json()), f"target {manifest.target}\n{describe(manifest)}\n{table(files)}"


def program_facts(
    model: str, passes: Sequence[str], only_changes: bool, html: Path | None
) -> tuple[dict[str, Any], str]:
    """The program traced from a model, after passes if there are any; with `html`, a page of what each pass did."""
    from sylvester.cli_inputs import load_model
    from sylvester.compiler import graph_html
    from sylvester.compiler.driver import trace
    from sylvester.compiler.graph_steps import recording
    from sylvester.compiler.printing import diff

    with recording() as record:
        traced = trace(*load_model(model))
        program = traced.rewrite(passes) if passes else traced
    facts = {name: {"nodes": len(entry.calls())} for name, entry in program.entries.items()}
    shown = {"entries": facts, "parameter_bytes": program.weights.nbytes}
    if html is not None:
        html.write_text(
            graph_html.render(f"{model}: {', '.join(passes) or 'as traced'}", record.steps), encoding="utf-8"
        )
        return shown | {"html": str(html)}, f"wrote {html}"
    return shown, diff(traced, program) if only_changes else str(program)
