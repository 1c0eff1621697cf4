"""Which tiles the launches of an artefact take: what the database knows of them, after timing them on the device."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from sylvester.backends.cuda.bench import Bench
from sylvester.backends.cuda.device import Device, OutOfMemory
from sylvester.backends.cuda.driver import first_device
from sylvester.backends.cuda.problems import Site, sites
from sylvester.backends.cuda.runtime import built_for
from sylvester.backends.tuner import run_race
from sylvester.backends.tuning import gain
from sylvester.backends.tuning_database import Database, Entry, Key, default_path
from sylvester.codegen.compile import hints_of
from sylvester.codegen.gpu_plan import GpuEntry, Launch
from sylvester.codegen.index import Size
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress

Hints = Mapping[str, Mapping[Size, int]]


@dataclass(frozen=True)
class Tuned:
    """The entries with the tiles that won, and lines for the ledger."""

    entries: dict[str, GpuEntry]
    notes: tuple[str, ...]


def tuned(entries: Mapping[str, GpuEntry], hints: Hints, arch: str, database: Database) -> Tuned:
    """What the database knows, for every launch that has other tiles."""
    notes: dict[str, str] = {}
    made = {}
    for name, entry in entries.items():
        chosen = {id(site.launch): _chosen(site, arch, database, notes) for site in sites(entry, hints[name])}
        launches = tuple(chosen.get(id(launch), launch) for launch in entry.launches)
        made[name] = replace(entry, launches=launches)
    return Tuned(made, tuple(f"tuning: {note}" for note in notes.values()))


def _chosen(site: Site, arch: str, database: Database, notes: dict[str, str]) -> Launch:
    key = key_of(site, arch)
    entry = database.look_up(key)
    if entry is None:
        return site.launch
    notes[key.problem] = f"{_short(site)}, {arch}: {gain(entry)}, measured {entry.at[:10]}"
    found = {str(name): candidate for name, candidate in site.candidates().items()}
    if entry.chosen not in found:
        return site.launch
    best = found[entry.chosen]
    return replace(site.launch, kernel=best.kernel, grid=best.grid)


def _short(site: Site) -> str:
    sizes = "x".join(str(site.numbers[n]) for n in ("m", "n", "k", "rows", "keys", "blocks") if n in site.numbers)
    return f"{site.launch.kernel.function} {sizes}"


def key_of(site: Site, arch: str) -> Key:
    """Where the database keeps a problem: by the text of the kernel, the architecture and the compiler."""
    text = sha256(site.launch.kernel.text.encode()).hexdigest()
    return Key(text, site.problem, arch, 0, f"triton {metadata.version('triton')}")


def search(
    entries: Mapping[str, GpuEntry],
    hints: Hints,
    device: Device,
    arch: str,
    seconds: float,
    database: Database,
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Time what the database has no finished race of; every round is stored as it ends. Lines for the ledger."""
    found = {key_of(site, arch): site for name, entry in entries.items() for site in sites(entry, hints[name])}
    waiting = [(key, site) for key, site in found.items() if not _finished(database.look_up(key))]
    end, notes = clock() + seconds, []
    with tempfile.TemporaryDirectory(prefix="sylvester-cubins-") as folder:
        for done, (key, site) in enumerate(waiting):
            if clock() >= end:
                notes.append(f"tuning: the time ran out before {len(waiting) - done} of {len(waiting)} kernels")
                break
            progress(f"tune {_short(site)}", done, len(waiting))
            deadline = clock() + (end - clock()) / (len(waiting) - done)
            notes += _race(site, key, device, arch, Path(folder), database, partial(_past, clock, deadline))
    return notes


def _past(clock: Callable[[], float], deadline: float) -> bool:
    return clock() >= deadline


def _race(
    site: Site, key: Key, device: Device, arch: str, folder: Path, database: Database, spent: Callable[[], bool]
) -> list[str]:
    try:
        with Bench(site, device, arch, folder) as bench:
            wrong = bench.wrong()
            right = [candidate for candidate in bench.candidates if candidate not in wrong]
            run_race(database, key, right, bench.measure, spent=spent)
    except OutOfMemory as cause:
        return [f"tuning: {_short(site)} was not timed: {cause.message}"]
    return [f"tuning: {_short(site)} {name} computes something else here and is left out" for name in wrong]


def tiles(
    program: Program, entries: Mapping[str, GpuEntry], archs: Sequence[str], seconds: float | None, progress: Progress
) -> Tuned:
    """Default tiles where there is nothing to go by, with the reason.

    `CompileError` when there are seconds to tune but several architectures; `Unsupported` without a GPU for the one.
    """
    if len(archs) > 1:
        if seconds is not None:
            hint = f"give sv.Target('cuda', arch={archs[-1]!r})"
            raise CompileError(f"tuning takes one architecture, found {list(archs)}", hint=hint)
        return Tuned(dict(entries), ("tuning: default tiles, as there are several architectures",))
    path = default_path()
    if knobs.TUNE.get() == "0" or (seconds is None and not path.exists()):
        return Tuned(dict(entries), ("tuning: default tiles, nothing was measured",))
    hints = {name: hints_of(program.entries[name]) for name in entries}
    with Database(path) as database:
        notes = [] if seconds is None else _searched(entries, hints, archs[0], seconds, database, progress)
        found = tuned(entries, hints, archs[0], database)
    unknown = ("tuning: default tiles, nothing is known of these kernels",)
    return replace(found, notes=(*notes, *(found.notes or unknown)))


def _searched(
    entries: Mapping[str, GpuEntry],
    hints: Hints,
    arch: str,
    seconds: float,
    database: Database,
    progress: Progress,
) -> list[str]:
    device = first_device()
    built_for(device.arch, (arch,))
    return search(entries, hints, device, arch, seconds, database, progress)


def _finished(entry: Entry | None) -> bool:
    return entry is not None and entry.finished
