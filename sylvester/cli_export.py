"""A model, rewritten by passes, in a format of others: a Hugging Face folder, or ONNX graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sylvester.cli_inputs import load_model
from sylvester.compiler.artefact import check_destination
from sylvester.compiler.driver import compile, trace
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface import WEIGHTS
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.progress import Progress, watching
from sylvester.compiler.resolve import resolve_passes
from sylvester.compiler.samples import listed, parse

FORMATS = ("hf", "onnx")


def export(
    model: str, output: Path, form: str, passes: list[str], data: Any, stock: bool, progress: Progress
) -> dict[str, Any]:
    """Write the folder; returns what a person or a script wants to know of it."""
    if form not in FORMATS:
        raise CompileError(f"no export format {form!r}", hint=f"there are {list(FORMATS)}")
    if form == "onnx":
        return _export_onnx(model, output, passes, data, progress)
    steps = tuple(step for step in resolve_passes(passes) if isinstance(step, Pass))
    if len(steps) < len(resolve_passes(passes)):
        raise CompileError(f"{passes} has a recipe, an export takes passes", hint="write its passes out instead")
    program = trace(*load_model(model))
    if data is not None:
        program.calibration = parse(program, listed(data) or [])
    with watching(progress):
        rewritten, ledger = Pipeline(steps).run(program)
    rewritten.export_hf(output, stock=stock)
    return {
        "folder": str(output),
        "format": form,
        "skipped": rewritten.info.get("skipped", {}),
        "bytes": (output / WEIGHTS).stat().st_size,
        "ledger": ledger.to_dict(),
        "text": str(ledger),
    }


def _export_onnx(model: str, output: Path, passes: list[str], data: Any, progress: Progress) -> dict[str, Any]:
    """What `compile` makes for the target `onnx`."""
    check_destination(output)
    module, example = load_model(model)
    with compile(module, example, target="onnx", passes=passes, calibration=data, progress=progress) as compiled:
        compiled.save(output)
        return {
            "folder": str(output),
            "format": "onnx",
            "bytes": sum(spec.bytes for spec in compiled.manifest.files.values()),
            "ledger": compiled.report["ledger"]["rows"],
            "text": compiled.ledger,
        }
