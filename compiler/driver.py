"""The compiler as one list: capture, raise, the caller's passes, build, seal, load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sylvester.compiler import compile_cache, registry, report_html
from sylvester.compiler.budget import Budget
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.causal_lm import analyse
from sylvester.compiler.changes import Refusal
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.draft_option import DraftOption
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.huggingface_parts import leave_out, require_present
from sylvester.compiler.ledger import Ledger
from sylvester.compiler.manifest import REPORT, REPORT_HTML, TOKENIZER, Manifest
from sylvester.compiler.pipeline import Event, Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress, silent, watching
from sylvester.compiler.resolve import Step, expand, resolve_passes
from sylvester.compiler.samples import listed, parse
from sylvester.compiler.target import Target, require_options
from sylvester.compiler.trace import capture

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    Model = nn.Module | Program | ExportedProgram | str | Path

RAISE = (
    "canonicalize",
    "fold-constants",
    "raise-norms",
    "raise-rope",
    "raise-attention",
    "raise-glu",
    # Raising leaves casts and reshapes around the new ops.
    "canonicalize",
    "fold-weights",
)
DERIVE = ("derive-decode", "last-logits")
"""For causal language models: needs attention and positions in raised form."""
LAST = {
    "share-prefix": ("shares", "prompts that begin alike are kept row by row"),
    "pad-prompt": ("pads", "prompts are read at their own lengths"),
}
"""For programs with caches, where a backend has the attribute: last, so that no other pass meets what they add."""

SEARCH = "sylvester.passes.search:Search"
"""The recipe that keeps a budget."""

DEFAULT_LENGTH = 2048
"""Capacity of the caches of a language model that states no limit itself."""


def trace(model: Model, example_inputs: Any = None, *, dynamic: Any = None) -> Program:
    """Capture a model as a Program in dialect ops: entries `prefill` and `decode` for a causal LM, else `forward`.

    `model` is a module, an ExportedProgram, a `.pt2` file or a Hugging Face folder; `example_inputs` a tuple or dict.
    `dynamic` None makes every batch and sequence dimension symbolic that allows it, else torch.export's dynamic_shapes.
    """
    return _trace(model, example_inputs, dynamic, silent)[0]


def compile(
    model: Model,
    example_inputs: Any = None,
    *,
    target: Target | str = "cpu",
    passes: str | Step | Sequence[str | Step] = (),
    calibration: Iterable[Any] | Calibration | None = None,
    draft: str | Step | Sequence[str | Step] | None = None,
    budget: Budget | str | Mapping[str, Any] | None = None,
    dynamic: Any = None,
    tune: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model for a target. The result is called like the model; `save` keeps it.

    `calibration` is data that passes fit to and that lossy passes are measured on: texts, token ids [tokens] or
    [batch, tokens], tuples of inputs or dicts by name. The last quarter is held back for measuring only.
    With a `budget`, what each layer becomes is searched for after `passes`, within bounds on size, latency, memory and
    quality.

    `draft` is what makes a cheaper copy of `decode` that proposes tokens while generating, which the model verifies:
    lossy passes by name or as instances; "swift" or "exit", which find the parts it skips, or the layer it ends at,
    while generating; "ngram" for what was read before; or some of these. What is generated stays the same.
    """
    report = progress or silent
    chosen = Target.parse(target, threads=threads, tune=tune)
    backend = registry.lookup("targets", chosen.name)()
    require_options(chosen, getattr(backend, "options", ()))
    if chosen.tune is not None and not getattr(backend, "tunes", False):
        raise Unsupported(f"the target {chosen.name!r} has nothing to tune", hint="leave out `tune`")
    if not set(chosen.engines) <= set(getattr(backend, "engines", ())):
        raise Unsupported(f"the target {chosen.name!r} takes no engine {chosen.engines[0]!r}", hint="use target 'cpu'")
    steps = (*resolve_passes(passes), *_searched(budget, calibration))
    drafts = None if draft is None else DraftOption.parse(draft)
    data = listed(calibration)
    key = compile_cache.key(
        model, example_inputs, dynamic, chosen, (*steps, *([drafts] if drafts else [])), backend, data
    )
    if reused := compile_cache.reuse(key, threads):
        return reused
    program, raised = _trace(model, example_inputs, dynamic, report, chosen.max_length)
    program = _calibrated(program, data, report)
    with watching(report):
        expansion = expand(steps, program, backend.machine(program, chosen))
    rewrites = expansion.passes
    program, rewritten = _rewrite(program, rewrites, report)
    if drafts:
        with watching(report):
            step = drafts.expand(program, backend.machine(program, chosen))
        program, drafted = _rewrite(program, (step,), report)
        rewrites, rewritten = (*rewrites, step), Ledger(rewritten.rows + drafted.rows)
    program = _completed(program, backend)
    folder = compile_cache.workplace(key)
    try:
        manifest = backend.build(program, chosen, folder, report)
        _add_tokenizer(program, folder)
        notes = [*expansion.notes, *program.info.get("notes", []), *getattr(backend, "notes", ()), *key.notes]
        fusions = list(getattr(backend, "fusions", ()))
        facts = {"model": _model_facts(program), **getattr(backend, "facts", {}), **expansion.facts}
        manifest = replace(manifest, passes=tuple(map(str, rewrites)))
        ledger = Ledger(raised.rows + rewritten.rows, notes, fusions, start=len(raised.rows))
        _write_report(folder, manifest, ledger, facts)
        manifest.seal(folder)
        compile_cache.keep(key, folder)
        return Compiled.owning(folder, threads=threads)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _trace(
    model: Model, example_inputs: Any, dynamic: Any, progress: Progress, max_length: int = 0
) -> tuple[Program, Ledger]:
    if isinstance(model, Program):
        return model, Ledger()
    progress("trace", 0, 1)
    program = capture(model, example_inputs, dynamic=dynamic)
    progress("trace", 1, 1)
    program.info["captured"] = list(program.weights)
    _limit_length(program, max_length)
    program, ledger = _rewrite(program, _built_in(RAISE), progress)
    leave_out(program, "all")
    program, ledger = _derive(program, ledger, progress)
    leave_out(program, "decode")
    require_present(program)
    return program, ledger


def raised(program: Program) -> Program:
    """A captured program in dialect ops, without entries that are derived from it."""
    return _rewrite(program, _built_in(RAISE), silent)[0]


def _derive(program: Program, ledger: Ledger, progress: Progress) -> tuple[Program, Ledger]:
    """Entries `prefill` and `decode` for a causal LM; a language model that does not allow them gets a note."""
    model = analyse(program)
    if isinstance(model, Refusal):
        if program.info.get("kind") == "causal-lm":
            program.info["notes"].append(f"no prefill and decode entries: {model.reason}")
        return program, ledger
    if not (program.info.get("max_length") or model.limit):
        program.info["max_length"] = DEFAULT_LENGTH
        program.info["notes"].append(
            f"the model states no longest sequence: caches hold {DEFAULT_LENGTH} tokens; Target(max_length=) sets it"
        )
    program, derived = _rewrite(program, _built_in(DERIVE), progress)
    return program, Ledger(ledger.rows + derived.rows)


def _completed(program: Program, backend: Any) -> Program:
    """With what the passes in `LAST` add, where the backend wants it; a note where it cannot be."""
    for name, (wanted, otherwise) in LAST.items():
        if program.state and getattr(backend, wanted, False):
            program, ledger = Pipeline(_built_in((name,)), check=False).run(program)
            refused = [f"{otherwise}: {r.reason}" for r in ledger.rows[0].changes.refused]
            program.info["notes"] = [*program.info.get("notes", ()), *refused]
    return program


def _limit_length(program: Program, max_length: int) -> None:
    """The caller may shorten the longest sequence, not stretch it."""
    longest = program.info.get("max_length")
    if max_length and longest and max_length > longest:
        raise CompileError(
            f"max_length is {max_length}, the model takes at most {longest} tokens", hint="give less, or 0"
        )
    if max_length:
        program.info["max_length"] = max_length


def _calibrated(program: Program, given: list[Any] | Calibration | None, progress: Progress) -> Program:
    """The program with its calibration data, when there is any."""
    if given is None:
        return program
    progress("calibration", 0, 1)
    program = program.clone()
    program.calibration = parse(program, given)
    progress("calibration", 1, 1)
    return program


def _built_in(names: Sequence[str]) -> tuple[Pass, ...]:
    return tuple(registry.lookup("passes", name)() for name in names)


def _rewrite(program: Program, steps: tuple[Pass, ...], progress: Progress) -> tuple[Program, Ledger]:
    def observe(event: Event) -> None:
        progress(f"pass {event.step}", event.index + 1, len(steps))

    with watching(progress):
        return Pipeline(steps, (observe,)).run(program)


def _searched(budget: Budget | str | Mapping[str, Any] | None, calibration: object) -> tuple[Step, ...]:
    """What keeps a budget, as a step after those of the caller."""
    if budget is None:
        return ()
    wanted = Budget.parse(budget)
    if calibration is None:
        hint = "compile(..., calibration=texts)"
        raise CompileError(f"a {wanted} is kept by measuring on calibration data, and there is none", hint=hint)
    return (registry.resolve(SEARCH)(budget=wanted),)


def _add_tokenizer(program: Program, folder: Path) -> None:
    source = program.info.get("tokenizer")
    if not source:
        return
    if not Path(source).is_file():
        raise CompileError(f"no tokenizer at {str(source)!r}", hint="put tokenizer.json beside config.json")
    shutil.copyfile(source, folder / TOKENIZER)


def _model_facts(program: Program) -> dict[str, object]:
    data = program.calibration
    return {
        "architecture": program.info.get("architecture", ""),
        "kind": program.info.get("kind", ""),
        "max_length": program.info.get("max_length", 0),
        "layers": program.info.get("depth", 0),
        "calibration": {"fit": len(data.fit), "held": len(data.held)} if data else None,
    }


def _write_report(folder: Path, manifest: Manifest, ledger: Ledger, facts: Mapping[str, object]) -> None:
    parts = {
        "rows": ledger.to_dict(),
        "start": ledger.start,
        "totals": asdict(ledger.totals()),
        "fusions": ledger.fused(),
        "notes": ledger.notes,
        "text": str(ledger),
    }
    report = {"ledger": parts, **facts}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / REPORT_HTML).write_text(report_html.render(report, manifest), encoding="utf-8")
