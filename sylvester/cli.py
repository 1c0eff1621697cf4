"""The commands, each a thin layer over the public functions; `--json` prints one JSON value instead of text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sylvester import __version__
from sylvester.cli_show import alike, emit, table, watched

app = typer.Typer(
    name="sylvester",
    help="Compile PyTorch models: every rewrite has a contract, every claim is measured on the target.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""Of the click that typer uses, be it its own copy or the package."""

INTERRUPTED = 130
"""What some versions of typer return where others raise `Abort`."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Folder = Annotated[Path, typer.Argument(help="An artefact folder.", metavar="ARTEFACT")]
Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder, a .pt2 file, or module:factory returning a module or (module, inputs)."
    ),
]
PASSES = "Passes and recipes to apply, separated by commas, with options such as quantize(weights=4, group=32)."
Threads = Annotated[int | None, typer.Option(help="Threads to use; default: every core.")]


class Drafts(StrEnum):
    """What proposes tokens while generating."""

    COMPILED = "compiled"
    NGRAM = "ngram"
    NONE = "none"

    @property
    def option(self) -> str | bool | None:
        """As `Compiled.generate` takes it."""
        return {Drafts.COMPILED: None, Drafts.NGRAM: "ngram", Drafts.NONE: False}[self]


def run(arguments: Sequence[str]) -> int:
    """Parse and run; a usage error is shown and gives 2, an interrupt is raised as such."""
    try:
        code = int(app(list(arguments), standalone_mode=False) or 0)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except UsageError as error:
        error.show()
        return 2
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _passes(text: str) -> list[str]:
    if not text:
        return []
    from sylvester.compiler.resolve import separated

    return separated(text)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile PyTorch models."""


@app.command("compile")
def compile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the artefact goes.")],
    target: Annotated[str, typer.Option(help="What to compile for.")] = "cpu",
    passes: Annotated[str, typer.Option(help=PASSES)] = "",
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the target, such as opset=23 or ops=ort; may be repeated.")
    ] = None,
    threads: Threads = None,
    max_length: Annotated[
        int, typer.Option(min=0, help="Longest sequence of a language model; 0: the model's own.")
    ] = 0,
    calibration: Annotated[
        Path | None, typer.Option(help="Data for passes that measure: a text, or token ids in .npy or .safetensors.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Bounds to keep by choosing what each layer becomes: size=40MB,latency=5ms,max_kl=0.05.")
    ] = "",
    draft: Annotated[
        str | None,
        typer.Option(
            help="What proposes tokens while generating: passes for a cheaper decode step, swift or exit, ngram, tree."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a model and save the artefact."""
    from sylvester.compiler.artefact import check_destination
    from sylvester.compiler.target import Target

    check_destination(output)
    from sylvester.cli_inputs import load_model, named_options, read_calibration
    from sylvester.compiler.driver import compile as build

    start = time.perf_counter()
    data = None if calibration is None else read_calibration(calibration)
    module, example = load_model(model)
    names = _passes(passes)
    with watched(not as_json) as progress:
        chosen = Target(target, max_length=max_length, options=named_options(option or []))
        options: dict[str, Any] = {"passes": names, "calibration": data, "threads": threads, "progress": progress}
        options |= {"budget": budget or None, "draft": draft}
        compiled = build(module, example, target=chosen, **options)
    with compiled:
        compiled.save(output)
        size, seconds = sum(spec.bytes for spec in compiled.manifest.files.values()), time.perf_counter() - start
        facts = {
            "artefact": str(output),
            "target": target,
            "entries": compiled.entries,
            "bytes": size,
            "seconds": seconds,
        }
        facts["ledger"] = compiled.report["ledger"]["rows"]
        done = f"{output}: {', '.join(compiled.entries)}, {size / 1e6:.1f} MB, in {seconds:.1f} s"
        emit(facts, f"{compiled.ledger}\n{done}", as_json)


@app.command("export")
def export_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the folder goes.")],
    form: Annotated[
        str, typer.Option("--format", help="hf: a Hugging Face folder; onnx: graphs with one file of weights.")
    ] = "hf",
    passes: Annotated[str, typer.Option(help=PASSES)] = "",
    calibration: Annotated[
        Path | None, typer.Option(help="Data for passes that measure: a text, or token ids in .npy or .safetensors.")
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="With copies and zeros, so that transformers itself computes the same.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model and save it in the format of its own library."""
    from sylvester.cli_export import export
    from sylvester.cli_inputs import read_calibration

    data = None if calibration is None else read_calibration(calibration)
    with watched(not as_json) as progress:
        facts = export(model, output, form, _passes(passes), data, stock, progress)
    text = facts.pop("text")
    emit(facts, f"{text}\n{output}: {facts['bytes'] / 1e6:.1f} MB", as_json)


@app.command("run")
def run_command(
    artefact: Folder,
    inputs: Annotated[
        list[Path], typer.Option("--input", "-i", help="Inputs: .npz or .json by name, or .npy in order.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run an artefact on inputs from files; prints a summary of each output."""
    from sylvester.cli_inputs import read_inputs, summary, write_outputs
    from sylvester.compiler.binding import asked
    from sylvester.compiler.compiled import load

    with load(artefact, threads=threads) as compiled:
        specs = asked(compiled.manifest.entries[compiled.manifest.main])
        result = compiled(**read_inputs(inputs, specs))
        names = [spec.name for spec in compiled.manifest.entries[compiled.manifest.main].outputs]
    values = (
        list(result.values()) if isinstance(result, dict) else list(result) if isinstance(result, tuple) else [result]
    )
    arrays = dict(zip(names, values, strict=True))
    if output is not None:
        write_outputs(output, arrays)
    rows = [summary(name, array) for name, array in arrays.items()]
    emit({"outputs": rows}, table(rows), as_json)


@app.command()
def generate(
    artefact: Folder,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to add at most; default: what fits.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up p.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of the text so far become less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    draft: Annotated[
        Drafts,
        typer.Option(help="What proposes tokens: as compiled, what was read before, or nothing. Changes no token."),
    ] = Drafts.COMPILED,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text and stream what comes."""
    from sylvester.compiler.compiled import load

    start = time.perf_counter()
    with load(artefact, threads=threads) as compiled:
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        options |= {"repetition_penalty": repetition_penalty, "draft": draft.option}
        stream = compiled.generate(prompt, max_new_tokens, stream=True, **options)
        show: Callable[[str], object] = (lambda piece: None) if as_json else _write
        show(prompt)
        pieces = []
        for piece in stream:
            pieces.append(piece)
            show(piece)
        done = compiled.drafting
        drafting = {**asdict(done), "acceptance": done.share, "tokens_per_call": done.each}
    text = "".join(pieces)
    if not as_json:
        typer.echo()
        return
    seconds = time.perf_counter() - start
    emit({"prompt": prompt, "text": text, "seconds": seconds, "drafting": drafting}, "", as_json)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


@app.command()
def bench(
    artefact: Folder,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each entry.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Rows per call.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens, or other free sizes, per row.")] = 64,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time every kernel of one entry against the limits of this machine.")
    ] = False,
    entry: Annotated[str, typer.Option(help="The entry for --kernels; default: decode, else the main one.")] = "",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time every entry: the median of some calls after a warm-up."""
    from sylvester.cli_bench import measure
    from sylvester.compiler.artefact import open_runner

    if kernels:
        from sylvester.cli_kernels import print_kernels

        print_kernels(artefact, threads, as_json, entry=entry, runs=runs, batch=batch, length=length)
        return
    runner = open_runner(artefact, threads)
    rows = measure(runner, runs=runs, batch=batch, length=length)
    runner.close()
    emit({"batch": batch, "entries": rows}, table(rows), as_json)


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(help="An artefact folder, or a model as for `compile`.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure at most, builds included.")] = 30.0,
    passes: Annotated[str, typer.Option(help=PASSES)] = "",
    threads: Threads = None,
    explain: Annotated[bool, typer.Option("--explain", help="Measure nothing; say what is known and why not.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write all results to this JSON file.")] = None,
    merge: Annotated[Path | None, typer.Option(help="Take over results from such a file.")] = None,
    as_json: Json = False,
) -> None:
    """Time kernels on this machine; later compilations use what was found."""
    from sylvester.cli_tune import run as tune_rows

    rows = tune_rows(model, _passes(passes), seconds, threads, not as_json, explain=explain, export=export, merge=merge)
    if not rows and model is None:
        raise UsageError("give a model or an artefact, --export or --merge")
    emit(rows, "\n\n".join(map(table, alike(rows))), as_json)


@app.command()
def passes(as_json: Json = False) -> None:
    """List the passes: name, contract, what they do."""
    from sylvester.cli_show import pass_rows

    rows = pass_rows()
    emit(rows, table(rows), as_json)


@app.command()
def show(
    model: Model,
    passes: Annotated[str, typer.Option(help=PASSES)] = "",
    diff: Annotated[bool, typer.Option("--diff", help="Only the lines that the passes changed.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the graph before and after every pass, side by side, to this page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print an artefact's entries and files, or the program traced from a model, before or after passes."""
    from sylvester.cli_show import artefact_facts, program_facts

    steps = _passes(passes)
    if not (Path(model) / "manifest.json").exists():
        facts, text = program_facts(model, steps, diff, html)
    elif steps or diff or html:
        raise typer.BadParameter("--passes, --diff and --html are for models, this is an artefact")
    else:
        facts, text = artefact_facts(Path(model))
    emit(facts, text, as_json)


@app.command()
def report(
    artefact: Folder,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Say what every pass of a compilation did and cost."""
    from sylvester.cli_report import report_facts, write_page

    facts, text = report_facts(artefact)
    if html is not None:
        write_page(artefact, html)
        text = f"wrote {html}"
    emit(facts, text, as_json)


@app.command()
def serve(
    artefact: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0: every network.")] = "127.0.0.1",
    isolation: Annotated[
        bool, typer.Option("--isolation/--no-isolation", help="Send the headers that allow threads.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Serve an artefact for the web, until interrupted."""
    from sylvester.cli_serve import listen

    with listen(artefact, host, port, isolation) as server:
        facts = {"url": server.url, "artefact": str(artefact), "isolated": isolation}
        emit(facts, f"{artefact} at {server.url}, until Ctrl-C", as_json)
        sys.stdout.flush()
        server.serve_forever()


@app.command()
def doctor(
    limits: Annotated[
        bool, typer.Option("--limits", help="Measure memory bandwidth and peak arithmetic instead, or show them.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="With --limits: measure, whatever is known already.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has: versions, C compiler, CPU, folders, switches. Gives 1 when something is missing."""
    from sylvester.cli_doctor import examine, limit_facts

    if limits:
        with watched(not as_json) as progress:
            found, text = limit_facts(threads, again, progress)
        emit(found, text, as_json)
        return
    facts: dict[str, Any] = examine()
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in facts.items()]
    emit(facts, "\n".join(lines), as_json)
    if facts["problems"]:
        raise typer.Exit(1)
