"""What this machine has of what sylvester can use."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from sylvester import __version__
from sylvester.compiler import cores, knobs
from sylvester.compiler.errors import CompileError
from sylvester.compiler.progress import Progress
from sylvester.compiler.store import store

PACKAGES = ("torch", "numpy", "safetensors", "networkx", "transformers", "tokenizers", "ziglang", "typer", "rich")
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


def examine() -> dict[str, Any]:
    """Facts by name; `problems` lists what keeps a compilation from working."""
    problems: list[str] = []
    return {
        "sylvester": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "compiler": _compiler(problems),
        "machine": platform.machine(),
        "cpu features": _features(),
        "cores": cores.usable(),
        "cache": _cache(problems),
        "kept": _kept(problems),
        "switches": {knob.name: knob.get() for knob in knobs.KNOBS},
        "problems": problems,
    }


def limit_facts(threads: int | None, again: bool, progress: Progress) -> tuple[dict[str, Any], str]:
    """The measured limits of this machine, as facts and as tables."""
    from sylvester.backends.limits import MIB, measure
    from sylvester.cli_show import table

    limits = measure(threads, again=again, progress=progress)
    sizes = dict.fromkeys((r.threads, r.bytes) for r in limits.reads)
    rates = {(r.threads, r.bytes, r.huge_pages): r.bytes_per_second / 1e9 for r in limits.reads}
    pages = {"4 KB pages, GB/s": False, "2 MB pages, GB/s": True}
    reads = [
        {"read MiB": n / MIB, "threads": t, **{name: rates.get((t, n, huge)) for name, huge in pages.items()}}
        for t, n in sizes
    ]
    peaks = [
        {"peak": p.arithmetic, "unit": p.unit, "threads": p.threads, "Gop/s": p.operations_per_second / 1e9}
        for p in limits.peaks
    ]
    head = f"{limits.cpu}, {limits.threads} threads, {limits.toolchain}"
    return asdict(limits), f"{head}\n{table(reads)}\n{table(peaks)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler(problems: list[str]) -> str | None:
    from sylvester.backends.toolchain import find_compiler

    try:
        return " ".join(find_compiler().command)
    except CompileError as error:
        problems.append(f"{error.message} ({error.hint})")
        return None


def _features() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return [feature for feature in FEATURES if feature in flags]


def _cache(problems: list[str]) -> str:
    folder = knobs.cache_folder()
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        problems.append(f"the cache folder {folder} cannot be written; set {knobs.CACHE.name}")
    return str(folder)


def _kept(problems: list[str]) -> dict[str, str]:
    """What earlier runs left for reuse."""
    try:
        found = {kind: store(kind) for kind in ("code", "models")}
    except CompileError as error:
        problems.append(f"{error.message} ({error.hint})")
        return {}
    return {
        kind: f"{len(sizes)} of {sum(sizes.values()) / 1e6:.1f} MB, at most {kept.limit / 1e6:.0f} MB"
        for kind, kept in found.items()
        for sizes in [kept.sizes()]
    }
