"""Native code for x86-64: one C file built once per instruction set, weights laid out for the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sylvester.backends.base import Backend
from sylvester.backends.signature import dtype_text, manifest
from sylvester.backends.tensor_writer import Deferred, write_tensors
from sylvester.backends.toolchain import build_shared, find_compiler
from sylvester.codegen.compile import WeightUse, compile_program
from sylvester.codegen.isa import ISAS, Isa
from sylvester.codegen.linear import PANEL, pack
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.target import Target

BUILDERS = 2


class Cpu(Backend):
    name: ClassVar[str] = "cpu"

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        _require_float32(program)
        compiler = find_compiler()
        compiled = compile_program(program)
        isas = _chosen(target)
        progress("compile", 0, len(isas))
        with ThreadPoolExecutor(BUILDERS) as pool:
            jobs = [
                pool.submit(
                    build_shared, compiled.unit.text(isa), folder / "code" / f"{isa.name}.so", isa, compiler=compiler
                )
                for isa in isas
            ]
            try:
                for done, job in enumerate(jobs):
                    job.result()
                    progress("compile", done + 1, len(isas))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        write_tensors(folder / "weights.safetensors", _stored(program, compiled.weights))
        names = {entry: [use.name for use in uses] for entry, uses in compiled.weights.items()}
        return manifest(program, target, isas=[isa.name for isa in isas], weights=names)


def _chosen(target: Target) -> list[Isa]:
    """The variants to build; the scalar one is always among them because it tells what the CPU has."""
    known = {isa.name: isa for isa in ISAS}
    for name in target.isas:
        if name not in known:
            raise Unsupported(f"no CPU variant named {name!r}", hint=f"variants are {list(known)}")
    return [isa for isa in ISAS if not target.isas or isa.name in target.isas or isa is ISAS[0]]


def _require_float32(program: Program) -> None:
    wrong = {
        key: t.dtype for key, t in program.weights.items() if t.dtype in (torch.float64, torch.float16, torch.bfloat16)
    }
    if wrong:
        key, dtype = next(iter(wrong.items()))
        raise Unsupported(
            f"the cpu target computes in float32, found {len(wrong)} weights of other float types: {key!r} is {dtype}",
            hint="call model.float() before compiling",
        )


def _stored(program: Program, weights: Mapping[str, Iterable[WeightUse]]) -> dict[str, Deferred]:
    """Every stored tensor once, in order of first use."""
    uses = {use.name: use for entry in weights.values() for use in entry}
    return {name: _laid_out(program.weights[use.key], use.packed) for name, use in uses.items()}


def _laid_out(weight: Tensor, packed: bool) -> Deferred:
    plain = weight.detach().contiguous()
    if not packed:
        return Deferred(tuple(plain.shape), dtype_text(plain.dtype), plain.numpy)
    n, k = plain.shape
    return Deferred((-(-n // PANEL), k, PANEL), "float32", lambda: pack(plain.numpy()))
