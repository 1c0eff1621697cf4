"""A WebAssembly artefact, read by Python: it can be saved and served, not run."""

from __future__ import annotations

from pathlib import Path

from sylvester.compiler.manifest import Manifest
from sylvester.compiler.runner import RunsElsewhere


def load(folder: Path, manifest: Manifest, threads: int | None = None) -> RunsElsewhere:
    return RunsElsewhere(manifest)
