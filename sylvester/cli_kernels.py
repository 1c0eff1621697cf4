"""The roofline report: time, bytes and operations of every kernel of an entry, and the fraction of the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sylvester.backends.cpu_profile import Bound, KernelTime, bound, entry_bound, profile, streamed
from sylvester.backends.limits import Limits, measure
from sylvester.cli_bench import fitting, made_up, tokens_of, working_state
from sylvester.cli_show import emit, table, watched
from sylvester.compiler.artefact import open_runner
from sylvester.compiler.errors import ToolchainMissing
from sylvester.compiler.progress import Progress
from sylvester.compiler.runner import Runner, entry_of

Rows = list[dict[str, Any]]


def print_kernels(artefact: Path, threads: int | None, as_json: bool, **asked: Any) -> None:
    """What `bench --kernels` prints; `asked` are the sizes that `kernel_report` takes."""
    runner = open_runner(artefact, threads)
    with watched(not as_json) as progress:
        limits = machine_limits(runner, progress)
    report = kernel_report(runner, limits, **asked)
    runner.close()
    emit(report, report_text(report), as_json)


def kernel_report(
    runner: Runner, limits: Limits | None, *, entry: str, runs: int, batch: int, length: int
) -> dict[str, Any]:
    """Kernels grouped over the layers, by time, with the whole call last; without limits the fractions are left out."""
    name = entry_of(
        runner.manifest, entry or ("decode" if "decode" in runner.manifest.entries else runner.manifest.main)
    )
    inputs = made_up(runner.manifest.entries[name], batch, tokens_of(name, length))
    times = profile(runner, name, inputs, working_state(runner, name, inputs, length), runs)
    length = fitting(runner, name, length)
    groups: dict[str, list[KernelTime]] = {}
    for time in times:
        groups.setdefault(time.kernel.title, []).append(time)
    total = sum(t.seconds for t in times)
    rows = [_row(title, of, limits, total, streamed(times)) for title, of in groups.items()]
    rows.sort(key=lambda row: -row["ms"])
    whole = _facts("all kernels", times, total, entry_bound(times, limits) if limits else None)
    return {"entry": name, "batch": batch, "length": length, "kernels": rows, "call": whole, "steps": _steps(times)}


def _row(
    title: str, times: Sequence[KernelTime], limits: Limits | None, total: float, working_set: float
) -> dict[str, Any]:
    return _facts(title, times, total, bound(times, limits, working_set) if limits else None)


def _facts(title: str, times: Sequence[KernelTime], total: float, least: Bound | None) -> dict[str, Any]:
    seconds = sum(t.seconds for t in times)
    spent = max(seconds, 1e-12)
    facts = {
        "kernel": title,
        "calls": len(times),
        "ms": seconds * 1e3,
        "share": seconds / max(total, 1e-12),
        "GB/s": sum(t.bytes for t in times) / spent / 1e9,
        "Gflop/s": sum(t.flops for t in times) / spent / 1e9,
    }
    if least is None:
        return facts
    return {**facts, "limit": least.limit, "limit ms": least.seconds * 1e3, "of limit": least.seconds / spent}


def _steps(times: Sequence[KernelTime]) -> Rows:
    return [asdict(t.kernel) | {"seconds": t.seconds, "flops": t.flops, "bytes": t.bytes} for t in times]


def report_text(report: Mapping[str, Any]) -> str:
    """The table, percentages for shares."""
    rows = [*report["kernels"], report["call"]]
    head = f"{report['entry']}, batch {report['batch']}, length {report['length']}"
    return f"{head}\n{table([{key: _shown(key, value) for key, value in row.items()} for row in rows])}"


def _shown(key: str, value: object) -> object:
    return f"{value:.1%}" if key in ("share", "of limit") and isinstance(value, float) else value


def machine_limits(runner: Runner, progress: Progress) -> Limits | None:
    """Of as many threads as the runner uses; None where no C compiler can build the probe."""
    threads = getattr(runner, "threads", None)
    try:
        return measure(threads, progress=progress)
    except ToolchainMissing:
        return None
