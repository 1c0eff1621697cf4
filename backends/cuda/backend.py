"""Artefacts for NVIDIA GPUs: cubins of every kernel for each architecture, the list of launches, and the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from sylvester.backends.base import Backend
from sylvester.backends.cpu import require_float32
from sylvester.backends.cuda.compile import ARCHITECTURES, Cubin, build
from sylvester.backends.cuda.modules import require_triton
from sylvester.backends.cuda.plan_file import StoredKernel, described
from sylvester.backends.cuda.runtime import FILE, VERSION
from sylvester.backends.packed_weights import stored_tensors
from sylvester.backends.signature import manifest
from sylvester.backends.tensor_writer import Deferred, write_tensors
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries
from sylvester.compiler.errors import CompileError
from sylvester.compiler.manifest import WEIGHTS, Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.target import Target


class Cuda(Backend):
    """`Target.arch` chooses one architecture, such as "sm_90"; by default there are cubins for all of them."""

    name: ClassVar[str] = "cuda"

    def identity(self, target: Target) -> tuple[str, ...] | None:
        return ("cuda", metadata.version("triton") if find_spec("triton") else "", *architectures(target))

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        archs = architectures(target)
        require_triton()
        require_float32(program)
        entries = gpu_entries(program)
        kernels = {launch.kernel.key: launch.kernel for entry in entries.values() for launch in entry.launches}
        stored = _built(kernels, archs, folder, progress)
        numbers = {key: n for n, key in enumerate(kernels)}
        listed = {name: described(entry, numbers) for name, entry in entries.items()}
        text = json.dumps({"version": VERSION, "kernels": [asdict(k) for k in stored], "entries": listed})
        (folder / FILE).write_text(text + "\n", encoding="utf-8")
        write_tensors(folder / WEIGHTS, _tensors(program, entries))
        names = {name: _weights(entry) for name, entry in entries.items()}
        self.notes = [f"{len(kernels)} kernels for {', '.join(archs)}; default tiles: they were not tuned on a GPU"]
        return replace(manifest(program, target, weights=names), isas=archs)


def architectures(target: Target) -> tuple[str, ...]:
    """Those that are built for; `CompileError` for one that is not known."""
    if target.arch and target.arch not in ARCHITECTURES:
        raise CompileError(
            f"the target cuda is built for {list(ARCHITECTURES)}, found arch={target.arch!r}",
            hint="a cubin of sm_80 runs on every 8.x, one of sm_90 on Hopper",
        )
    return (target.arch,) if target.arch else ARCHITECTURES


def _built(kernels: Mapping[str, Kernel], archs: Sequence[str], folder: Path, progress: Progress) -> list[StoredKernel]:
    """Every kernel as a file for each architecture."""
    jobs = [(key, arch) for key in kernels for arch in archs]
    made: dict[tuple[str, str], Cubin] = {}
    for done, (key, arch) in enumerate(jobs):  # Triton parses Python, which CPython 3.11 does wrongly on two threads
        made[key, arch] = build(kernels[key], arch)
        progress("triton", done + 1, len(jobs))
    found = []
    for key, kernel in kernels.items():
        files = {arch: f"code/{arch}/{key[:16]}.cubin" for arch in archs}
        for arch, name in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(made[key, arch].image)
        shared = {arch: made[key, arch].shared for arch in archs}
        one = made[key, archs[0]]
        found.append(StoredKernel(one.function, tuple(kernel.types.values()), one.warps, shared, files))
    return found


def _weights(entry: GpuEntry) -> list[str]:
    return [b.key for b in entry.buffers.values() if b.kind == "weight"]


def _tensors(program: Program, entries: Mapping[str, GpuEntry]) -> dict[str, Deferred]:
    """The weights that kernels read, and the constants that they need besides."""
    used: dict[str, Any] = {
        name: tuple(b.layout for b in entry.buffers.values() if b.kind == "weight" and b.layout)
        for name, entry in entries.items()
    }
    tensors = dict(stored_tensors(program, used))
    for entry in entries.values():
        for key, tensor in entry.constants.items():
            array = tensor.numpy()
            tensors[key] = Deferred(tuple(array.shape), str(array.dtype), lambda array=array: array)  # type: ignore[misc]
    return tensors
