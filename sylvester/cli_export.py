"""A model, rewritten by passes, in a format of others: a Hugging Face folder, or ONNX graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sylvester.cli_inputs import load_model
from sylvester.compiler.artefact import check_destination
from sylvester.compiler.driver import compile, trace
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface import WEIGHTS
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.progress import Progress, watching
from sylvester.compiler.resolve import Step, expand, resolve_passes
from sylvester.compiler.samples import listed, parse
from sylvester.passes.choose_rotations import EQUALIZE
from sylvester.passes.recipes import LowBit

FORMATS = ("hf", "onnx")
TRIED = (EQUALIZE, "values")
"""What a recipe may try: other rotations may need transforms at run time, which a folder cannot say."""


def export(
    model: str, output: Path, form: str, passes: list[str], data: Any, stock: bool, progress: Progress
) -> dict[str, Any]:
    """Write the folder; returns what a person or a script wants to know of it."""
    if form not in FORMATS:
        raise CompileError(f"no export format {form!r}", hint=f"there are {list(FORMATS)}")
    if form == "onnx":
        return _export_onnx(model, output, passes, data, progress)
    steps, notes = _exportable(resolve_passes(passes))
    program = trace(*load_model(model))
    if data is not None:
        program.calibration = parse(program, listed(data) or [])
    with watching(progress):
        expansion = expand(steps, program, None)
        rewritten, ledger = Pipeline(expansion.passes).run(program)
    ledger = dataclasses.replace(ledger, notes=[*notes, *expansion.notes, *ledger.notes])
    rewritten.export_hf(output, stock=stock)
    return {
        "folder": str(output),
        "format": form,
        "skipped": rewritten.info.get("skipped", {}),
        "bytes": (output / WEIGHTS).stat().st_size,
        "ledger": ledger.to_dict(),
        "notes": ledger.notes,
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


def _exportable(steps: Sequence[Step]) -> tuple[list[Step], list[str]]:
    """Recipes without what transformers does in its own way, and notes on what that is."""
    found: list[Step] = []
    notes: list[str] = []
    for step in steps:
        if isinstance(step, LowBit):
            left = [*map(str, step.more), *(f"rotation {name}" for name in step.tried if name not in TRIED)]
            notes.append(f"recipe {step.name}: left out of a folder for transformers: {', '.join(left)}")
            step = dataclasses.replace(step, more=(), tried=tuple(name for name in step.tried if name in TRIED))
        found.append(step)
    return found, notes
