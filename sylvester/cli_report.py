"""The report of an artefact for a terminal, and as a page for a browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sylvester.compiler.artefact import read_report
from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.manifest import REPORT, REPORT_HTML, read_verified


def report_facts(folder: Path) -> tuple[dict[str, Any], str]:
    """The content of report.json, and what a person wants of it: the target, the model, and the ledger."""
    manifest = read_verified(folder)
    report = read_report(folder)
    if not report:
        raise ArtefactError(f"no {REPORT} in {str(folder)!r}", hint="compile the model again")
    model = report.get("model", {})
    data = model.get("calibration")
    facts = {
        "target": manifest.target,
        "model": model.get("architecture", ""),
        "passes": ", ".join(manifest.passes),
        "calibration": f"{data['fit']} samples to fit, {data['held']} held back" if data else "",
    }
    lines = [f"{name}: {value}" for name, value in facts.items() if value]
    return report, "\n".join([*lines, str(report.get("ledger", {}).get("text", ""))])


def write_page(folder: Path, destination: Path) -> None:
    """Copy the page that the compilation wrote."""
    source = folder / REPORT_HTML
    if not source.is_file():
        raise ArtefactError(f"no {REPORT_HTML} in {str(folder)!r}", hint="compile the model again")
    try:
        shutil.copyfile(source, destination)
    except OSError as error:
        raise CompileError(f"cannot write {str(destination)!r}: {error.strerror}") from error
