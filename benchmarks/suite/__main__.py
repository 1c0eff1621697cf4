"""Our engine and every installed peer, interleaved in one run on the same weights.

    python -m benchmarks.suite [--works S-decode B-encode ...] [--engines sylvester onnxruntime ...] [--json FILE]

Each work runs in a process of its own. Models are written once to the folder `--models`. A precision is compared with
the peers at that precision or a higher one; `of limit` is the fraction of this machine's bandwidth or arithmetic peak.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.suite import report
from benchmarks.suite.maker import MAKERS
from benchmarks.suite.worker import Order, locked
from benchmarks.suite.works import PRECISIONS, Work, chosen

MODELS = Path("~/.cache/sylvester-bench").expanduser()
VERSIONS = ("torch", "torchao", "onnxruntime", "openvino", "nncf", "llama-cpp-python", "transformers", "numpy")


def main() -> None:
    options = arguments()
    works = chosen(options.works)
    missing = {maker.name: maker.missing() for maker in MAKERS if maker.missing()}
    for name, packages in missing.items():
        print(f"missing: {name} (needs {', '.join(packages)})")
    found: list[report.Line] = []
    facts: dict[str, Any] = {"versions": dict(versions()), "threads": options.threads, "limits": {}, "missing": missing}
    for work in works:
        limits = None if work.kind == "zoo" else measured_limits(options.threads, options.lock)
        facts["limits"][work.name] = facts_of(limits)
        rows = list(run(work, options))
        new = report.lines(work, rows, limits, options.threads)
        print(*report.table(new), "", sep="\n", flush=True)
        found += new
        keep(found, facts, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="*", default=[], help="names or beginnings (S, zoo, vision); none: all")
    parser.add_argument("--engines", nargs="*", default=[], help=f"of {', '.join(m.name for m in MAKERS)}; none: all")
    parser.add_argument("--precisions", nargs="*", default=[], choices=PRECISIONS, help="none: all of a work")
    parser.add_argument("--models", type=Path, default=MODELS, help=f"folder of the model files (default {MODELS})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15, help="interleaved rounds, of which long works do fewer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--lock", default="", help="file to hold a lock on while timing, for machines that are shared")
    return parser.parse_args()


def run(work: Work, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one work; an engine that ends the process is left out and the work runs again without it."""
    log = options.models / "logs" / f"{work.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    skip: tuple[tuple[str, str], ...] = ()
    for _ in range(len(MAKERS) * len(PRECISIONS)):
        events, code = attempt(work, options, skip, log)
        rows = [Row(**event["row"]) for event in events if "row" in event]
        last = next((event["using"] for event in reversed(events) if "using" in event), ["starting", ""])
        if code == 0 or not last[1]:
            yield from rows
            if code:
                yield Row(work.name, last[0], "fp32", failure=f"ended with code {code}, see {log}")
            break
        skip += ((last[0], last[1]),)
        yield Row(work.name, last[0], last[1], failure=f"ended the process with code {code}, see {log}")


def attempt(
    work: Work, options: argparse.Namespace, skip: tuple[tuple[str, str], ...], log: Path
) -> tuple[list[dict[str, Any]], int]:
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        events = Path(folder) / "events"
        order = Order(
            work.name, tuple(options.engines), tuple(options.precisions), str(options.models), options.threads,
            options.runs, str(events), options.lock, skip,
        )  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.suite.worker", json.dumps(asdict(order))]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
        return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else [], code


def measured_limits(threads: int, lock: str) -> Any:
    """What the machine gives now: shared machines drift. None where there is no C compiler to measure with."""
    from sylvester.backends.limits import measure
    from sylvester.compiler.errors import CompileError

    try:
        with locked(lock):
            return measure(threads, again=True)
    except CompileError as problem:
        print(f"no limits: {problem}")
        return None


def facts_of(limits: Any) -> Any:
    return asdict(limits) if limits else None


def versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONS:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def keep(found: list[report.Line], facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Written after every work, so that an interrupted run leaves what it has."""
    if options.json:
        options.json.write_text(json.dumps(report.document(found, facts), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(report.drawing(found))


if __name__ == "__main__":
    main()
