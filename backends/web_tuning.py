"""What a page chooses micro-kernels from, as files: modules of candidates, and the problems with their weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sylvester.codegen.isa import Isa
from sylvester.codegen.web_candidates import every, module, module_name, space
from sylvester.codegen.web_problems import PanelProblem, Uses, ranked


def candidate_modules(uses: Uses, isa: Isa) -> dict[str, str]:
    """C texts by name of the module; they depend on formats alone, so that models share them in the cache of builds."""
    forms = {module_name(problem.format): problem.format for problem in uses}
    return {name: module(form, isa) for name, form in sorted(forms.items())}


def write_problems(folder: Path, uses: Uses, isas: Iterable[Isa]) -> None:
    """`code/tuning/<isa>.json`, without problems no file: the most worthwhile first, with candidates by number."""
    for isa in isas if uses else ():
        found = [_problem(problem, uses, isa) for problem in ranked(uses)]
        path = folder / "code" / "tuning" / f"{isa.name}.json"
        path.write_text(json.dumps({"problems": found}) + "\n", encoding="utf-8")


def _problem(problem: PanelProblem, uses: Uses, isa: Isa) -> dict[str, object]:
    numbers = {candidate: number for number, candidate in enumerate(every(problem.format, isa))}
    tried = space(problem.format, isa, problem.rows).candidates[1:]
    return {
        "format": problem.format.name,
        "group": problem.format.group,
        "module": module_name(problem.format),
        "depth": problem.depth,
        "rows": problem.rows,
        "candidates": {str(candidate): numbers[candidate] for candidate in tried},
        "weights": uses[problem].panels,
    }
