"""Artefacts for NVIDIA GPUs: cubins of every kernel for each architecture, the list of launches, and the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from sylvester.backends.base import Backend
from sylvester.backends.cuda.choice import PLAIN, TOP_K, TOP_P
from sylvester.backends.cuda.compile import Cubin, build
from sylvester.backends.cuda.modules import require_triton
from sylvester.backends.cuda.plan_file import StoredKernel, described
from sylvester.backends.cuda.runtime import FILE, VERSION
from sylvester.backends.cuda.tune import tiles
from sylvester.backends.float_types import READERS, require_float32
from sylvester.backends.identity import measurements
from sylvester.backends.resident import Resident, resident
from sylvester.backends.signature import manifest
from sylvester.backends.tensor_writer import Deferred, write_tensors
from sylvester.codegen.compile import hints_of
from sylvester.codegen.gpu_architectures import SHARED, USUAL, has_float8
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_norms import best, draw
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries, verifies
from sylvester.codegen.layout import Layout
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.manifest import WEIGHTS, Manifest
from sylvester.compiler.parallel_ops import RANKS
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.quantized_rows import FLOAT8
from sylvester.compiler.target import Target

FLOAT8_NEEDS = "weights in float8 need compute capability 8.9, that of sm_89 and later"


class Cuda(Backend):
    """`Target.arch` chooses one architecture, such as "sm_90"; without, cubins are for those of `USUAL` that can."""

    name: ClassVar[str] = "cuda"
    tunes: ClassVar[bool] = True
    pads: ClassVar[bool] = True

    def identity(self, target: Target) -> tuple[str, ...] | None:
        archs = architectures(target)
        known = measurements() if len(archs) == 1 else ""
        return ("cuda", metadata.version("triton") if find_spec("triton") else "", *archs, known)

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        archs, left_out = _capable(program, architectures(target))
        require_triton()
        require_float32(program, self.name, READERS)
        lasting = resident(program)
        tuning = tiles(program, gpu_entries(lasting.program, archs), archs, target.tune, progress)
        entries = tuning.entries
        weights = {name: _weights(entry) for name, entry in entries.items()}
        derived = lasting.derived(_layouts(entries))
        made = replace(manifest(program, target, weights=weights, steady=verifies(program)), derived=derived)
        choice = choosing() if made.generation else {}
        used = [launch.kernel for entry in entries.values() for launch in entry.launches]
        kernels = {kernel.key: kernel for kernel in (*used, *choice.values())}
        stored = _built(kernels, archs, folder, progress)
        numbers = {key: n for n, key in enumerate(kernels)}
        listed = {name: described(entry, numbers, _hints(program, name)) for name, entry in entries.items()}
        data = {"version": VERSION, "kernels": [asdict(k) for k in stored], "entries": listed}
        data["ranks"] = program.info.get(RANKS)
        data["choice"] = {role: numbers[kernel.key] for role, kernel in choice.items()}
        (folder / FILE).write_text(json.dumps(data) + "\n", encoding="utf-8")
        write_tensors(folder / WEIGHTS, _tensors(lasting, entries))
        told = [f"{FLOAT8_NEEDS}: no code for {', '.join(left_out)}"] if left_out else []
        told += [note for entry in entries.values() for note in entry.notes]
        self.notes = list(dict.fromkeys([f"{len(kernels)} kernels for {', '.join(archs)}", *told, *tuning.notes]))
        self.fusions = [fusion for entry in entries.values() for fusion in entry.fusions]
        return replace(made, isas=archs)


def architectures(target: Target) -> tuple[str, ...]:
    """Those that are built for; `CompileError` for one that is not known."""
    if target.arch and target.arch not in SHARED:
        raise CompileError(
            f"the target cuda is built for {list(SHARED)}, found arch={target.arch!r}",
            hint="sm_80 is A100, sm_86 RTX 30, sm_89 RTX 40 and L4, sm_90 H100, sm_100 B200, sm_120 RTX 50",
        )
    return (target.arch,) if target.arch else USUAL


def _capable(program: Program, archs: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of the architectures that have the arithmetic of the program, and the others; `Unsupported` for none."""
    used = any(entry.calls(*READERS[FLOAT8]) for entry in program.entries.values())
    left_out = tuple(arch for arch in archs if used and not has_float8(arch))
    kept = tuple(arch for arch in archs if arch not in left_out)
    if not kept:
        raise Unsupported(
            f"{FLOAT8_NEEDS}, found arch={left_out[0]!r}",
            hint="compile for sm_89 or later, or round to int8 (passes='w8a8'), which all of them multiply",
        )
    return kept, left_out


def choosing() -> dict[str, Kernel]:
    """The kernels that choose tokens, by what they do."""
    parts, whole = best()
    drawn = {PLAIN: draw(top_k=False, top_p=False), TOP_K: draw(top_k=True, top_p=False)}
    return {"best_parts": parts, "best_of_parts": whole, **drawn, TOP_P: draw(top_k=True, top_p=True)}


def _built(kernels: Mapping[str, Kernel], archs: Sequence[str], folder: Path, progress: Progress) -> list[StoredKernel]:
    """Every kernel as a file for each architecture; none for what the host does."""
    jobs = [(key, arch) for key, kernel in kernels.items() for arch in archs if kernel.text]
    made: dict[tuple[str, str], Cubin] = {}
    for done, (key, arch) in enumerate(jobs):  # Triton parses Python, which CPython 3.11 does wrongly on two threads
        made[key, arch] = build(kernels[key], arch)
        progress("triton", done + 1, len(jobs))
    found = []
    for key, kernel in kernels.items():
        if not kernel.text:
            found.append(StoredKernel(kernel.function, tuple(kernel.types.values()), 0, {}, {}))
            continue
        files = {arch: f"code/{arch}/{key[:16]}.cubin" for arch in archs}
        for arch, name in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(made[key, arch].image)
        shared = {arch: made[key, arch].shared for arch in archs}
        one = made[key, archs[0]]
        found.append(StoredKernel(one.function, tuple(kernel.types.values()), one.warps, shared, files))
    return found


def _hints(program: Program, name: str) -> dict[str, int]:
    """The sizes of the examples."""
    return {size.name: n for size, n in hints_of(program.entries[name]).items()}


def _weights(entry: GpuEntry) -> list[str]:
    return [b.key for b in entry.buffers.values() if b.kind == "weight"]


def _layouts(entries: Mapping[str, GpuEntry]) -> dict[str, tuple[Layout, ...]]:
    """Of the weights that kernels read."""
    return {
        name: tuple(b.layout for b in entry.buffers.values() if b.kind == "weight" and b.layout)
        for name, entry in entries.items()
    }


def _tensors(lasting: Resident, entries: Mapping[str, GpuEntry]) -> dict[str, Deferred]:
    """The weights that kernels read, or what they are made of, and the constants that kernels need besides."""
    tensors, _ = lasting.tensors(_layouts(entries))
    for entry in entries.values():
        for key, tensor in entry.constants.items():
            array = tensor.numpy()
            tensors[key] = Deferred(tuple(array.shape), str(array.dtype), lambda array=array: array)  # type: ignore[misc]
    return tensors
