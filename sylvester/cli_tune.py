"""`sylvester tune`: time the kernels of a model on this machine, and move or explain what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sylvester.backends import tuning_exchange as exchange
from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuner import Setting
from sylvester.backends.tuning import Finding, Problems, Tuning, gain, read_problems, runnable, tune
from sylvester.backends.tuning_database import Database, default_path
from sylvester.cli_show import watched
from sylvester.codegen.isa import variants
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError
from sylvester.compiler.progress import Progress
from sylvester.compiler.target import Target

Rows = list[dict[str, Any]]


def run(
    model: str | None,
    passes: list[str],
    seconds: float,
    threads: int | None,
    shown: bool,
    *,
    explain: bool,
    export: Path | None,
    merge: Path | None,
) -> Rows:
    """Take over results, then time or explain a model, then write all results; `shown` is a progress bar."""
    rows = [] if merge is None else [merge_from(merge)]
    if model is not None:
        with watched(shown) as progress:
            rows += explained(model, passes, threads) if explain else measure(model, passes, seconds, threads, progress)
    return rows if export is None else [*rows, export_to(export)]


def measure(model: str, passes: list[str], seconds: float, threads: int | None, progress: Progress) -> Rows:
    """Tune what a model or an artefact runs; a row per problem."""
    problems, target = problems_of(model, passes), Target.parse("cpu", threads=threads, tune=seconds)
    if not any(problems.values()):
        raise CompileError(f"{model!r} runs no kernel that can be tuned", hint="linear layers and attention can")
    compiler = find_compiler()
    isas = variants(_formats(problems), target.architecture)
    found: Tuning = tune(problems, isas, target, compiler, seconds=seconds, progress=progress)
    if found.remarks:
        raise CompileError("; ".join(found.remarks), hint=f"{knobs.TUNE.name} must not be 0")
    return [_row(finding) for finding in found.findings]


def explained(model: str, passes: list[str], threads: int | None) -> Rows:
    """Why each problem of a model is found in the database or not."""
    problems, target, compiler = problems_of(model, passes), Target.parse("cpu", threads=threads), find_compiler()
    isa = runnable(variants(_formats(problems), target.architecture), target, compiler)
    setting = Setting(isa, target.threads or knobs.threads(), compiler)
    with Database(default_path()) as database:
        keys = [setting.key(problem) for problem in dict.fromkeys(p for of in problems.values() for p in of)]
        return [{"problem": key.problem, "look-up": exchange.explain(database, key)} for key in keys]


def export_to(path: Path) -> dict[str, Any]:
    with Database(default_path()) as database:
        return {"file": str(path), "entries": exchange.export(database, path)}


def merge_from(path: Path) -> dict[str, Any]:
    with Database(default_path()) as database:
        return {"file": str(path), "taken": exchange.merge(database, path)}


def problems_of(model: str, passes: list[str]) -> Problems:
    """What an artefact says it was built for, or what a model becomes after the passes."""
    if (Path(model) / "manifest.json").exists():
        return read_problems(Path(model))
    from sylvester.cli_inputs import load_model
    from sylvester.codegen.compile import program_problems
    from sylvester.compiler.driver import trace
    from sylvester.compiler.pipeline import Pipeline
    from sylvester.compiler.resolve import expand, resolve_passes

    program = trace(*load_model(model))
    steps = expand(resolve_passes(passes), program, None).passes
    return program_problems(Pipeline(steps)(program))


def _formats(problems: Problems) -> set[str]:
    return {problem.format.partition("/")[0] for of in problems.values() for problem in of}


def _row(finding: Finding) -> dict[str, Any]:
    entry = finding.entry
    if entry is None:
        return {"problem": str(finding.problem), "candidate": "default", "gain": finding.text}
    return {"problem": str(finding.problem), "candidate": entry.chosen, "gain": gain(entry)}
