"""The peers and the minifier from npm, at pinned versions, in a folder of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

VERSIONS = {"@wllama/wllama": "3.13.0", "onnxruntime-web": "1.30.0", "esbuild": "0.28.2"}
RUNTIME = """
import "./model.js";
import "./worker.js";
import "./thread.js";
"""
"""All that a page loads but the tokenizer."""


def installed(folder: Path) -> Path:
    """`folder/node_modules` with exactly these versions; no package runs a script of its own."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed, and the peers come from there: apt-get install npm")
    listed = folder / "package.json"
    text = json.dumps({"private": True, "dependencies": VERSIONS}, indent=1)
    if not (folder / "node_modules").is_dir() or not listed.is_file() or listed.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        listed.write_text(text)
        try:
            subprocess.run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True)
        except subprocess.CalledProcessError:
            listed.unlink()
            raise
    return folder / "node_modules"


LATER = "./tuning.js"
"""Fetched once tuning runs."""


def minified(bundle: Path, modules: Path, *, later: bool = False) -> int:
    """Bytes of the runtime of a bundle in one piece, without the tokenizer and the page; `later`: with tuning."""
    esbuild = modules / "@esbuild" / platform(modules) / "bin" / "esbuild"
    kept = ["--external:node:*", "--external:./vendor/*", *([] if later else [f"--external:{LATER}"])]
    command = [esbuild, "--bundle", "--minify", "--format=esm", "--ignore-annotations", *kept]
    made = subprocess.run(command, input=RUNTIME.encode(), cwd=bundle, capture_output=True, check=True)
    return len(made.stdout)


def platform(modules: Path) -> str:
    """The one build of esbuild that npm chose for this machine."""
    return next(path.name for path in (modules / "@esbuild").iterdir())
