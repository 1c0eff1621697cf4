"""Our WebAssembly target beside wllama and onnxruntime-web in headless Chromium, interleaved in one run.

    python -m benchmarks.web [--only decode prefill encode first-token] [--threads 1 2] [--runs N] [--json FILE]

Every engine computes the same weights and is checked against PyTorch before it is timed (`error`: the mean difference
of log-probabilities, or the largest of hidden states). Blocks of calls take turns with each other and with the limits
of the page. Our times include messages, and sampling in JavaScript; those of wllama are its own; those of
onnxruntime-web leave the new caches inside. A precision is compared with the peers at that precision or a higher one.
Bundles are built for each run, unless `--bundles` names a folder to keep them in. It needs the extra `bench-web`, npm
and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser

from benchmarks.suite import report
from benchmarks.web import limits, packages, sizes
from benchmarks.web.browser import chromium
from benchmarks.web.measuring import measure
from benchmarks.web.models import bundle, made
from benchmarks.web.server import serving
from benchmarks.web.sources import checkpoint
from benchmarks.web.works import KINDS, SHIPPED, chosen

MODELS = Path("~/.cache/sylvester-bench").expanduser()


def main() -> None:
    options = arguments()
    modules = packages.installed(options.models / "npm")
    with tempfile.TemporaryDirectory(prefix="sylvester-web-") as scratch:
        limits.build(Path(scratch))
        bundles = options.bundles or Path(scratch, "bundles")
        folders = {"models": options.models, "bundles": bundles, "npm": modules, "limits": Path(scratch)}
        with serving(folders) as site, chromium() as browser:
            print(f"Chromium {browser.version}, {packages.VERSIONS}", flush=True)
            facts = {"browser": browser.version, "packages": packages.VERSIONS, "runs": options.runs}
            run(options, facts, modules, bundles, browser, site)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=KINDS, help="none: all")
    parser.add_argument("--works", nargs="*", default=[], help="beginnings of names (novels, S-decode); none: all")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=5, help="blocks of calls of every engine")
    parser.add_argument("--models", type=Path, default=MODELS, help=f"folder of models and npm packages ({MODELS})")
    parser.add_argument("--bundles", type=Path, help="folder of bundles that are used again")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run(
    options: argparse.Namespace, facts: dict[str, Any], modules: Path, bundles: Path, browser: Browser, site: str
) -> None:
    found: list[report.Line] = []
    facts |= {"limits": {}, "engines": {}, "load": {}}
    for work in chosen(options.only, options.threads, options.works):
        models = list(made(work, options.models, bundles))
        facts["load"][work.name] = os.getloadavg()[0]
        measured = measure(work, models, browser, site, options.models, options.runs)
        facts["engines"][work.name], facts["limits"][work.name] = measured.facts, asdict(measured.limits)
        lines = report.lines(work, measured.rows, measured.limits, work.threads)
        print(*report.table(lines), *rates(measured.limits), "", sep="\n", flush=True)
        found += lines
        keep(options.json, found, facts)
    if not options.only or "first-token" in options.only:
        shipped = bundle(checkpoint(SHIPPED, options.models), "int4", bundles)
        first = sizes.first_token(browser, site, f"/bundles/{shipped.name}/", options.runs)
        about = [*sizes.sizes(shipped, modules), first]
        print(*about, sep="\n")
        facts["shipped"] = [asdict(fact) for fact in about]
    keep(options.json, found, facts)


def rates(measured: Any) -> list[str]:
    reads = ", ".join(f"{r.bytes / 1e6:.0f} MB {r.bytes_per_second / 1e9:.1f} GB/s" for r in measured.reads)
    peaks = ", ".join(f"{p.arithmetic} {p.operations_per_second / 1e9:.0f} Gop/s" for p in measured.peaks)
    return [f"limits of the page: reads of {reads}; {peaks}"]


def keep(path: Path | None, found: Sequence[report.Line], facts: dict[str, Any]) -> None:
    """Written after every work, so that an interrupted run leaves what it has."""
    if path:
        path.write_text(json.dumps(report.document(found, facts), indent=1) + "\n")


if __name__ == "__main__":
    main()
