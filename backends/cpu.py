"""Native code for x86-64: one C file built once per instruction set, weights laid out for the kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from sylvester.backends.base import Backend
from sylvester.backends.cpu_machine import CpuMachine
from sylvester.backends.engines import claim
from sylvester.backends.float_types import require_float32
from sylvester.backends.identity import identity
from sylvester.backends.kernel_table import write_table
from sylvester.backends.memory_plan import memory_plan
from sylvester.backends.resident import resident
from sylvester.backends.signature import manifest
from sylvester.backends.tensor_writer import write_tensors
from sylvester.backends.toolchain import build_shared, find_compiler
from sylvester.backends.tuning import tune, write_problems
from sylvester.codegen.compile import compile_program
from sylvester.codegen.isa import WASM, variants
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.recipe import Machine
from sylvester.compiler.target import ENGINES, Target, host_architecture

BLOCK_ROWS = 128
ENGINE_SHARE = 0.5
"""Of the time for tuning, where another compiler competes for regions."""


class Cpu(Backend):
    name: ClassVar[str] = "cpu"
    tunes: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ENGINES
    shares: ClassVar[bool] = True

    def identity(self, target: Target) -> tuple[str, ...] | None:
        return identity(target)

    def machine(self, program: Program, target: Target) -> Machine | None:
        """One row at a time for models that decode, a block of rows for others."""
        if target.architecture != host_architecture():
            return None
        return CpuMachine(self, target, rows=1 if "decode" in program.entries else BLOCK_ROWS)

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        require_float32(program, self.name)
        if target.architecture == WASM:
            raise Unsupported("the cpu target builds no WebAssembly", hint="compile with target='wasm'")
        compiler = find_compiler(architecture=target.architecture)
        lasting = resident(program)
        compiled = compile_program(lasting.program)
        names = {entry: [use.name for use in uses] for entry, uses in compiled.weights.items()}
        stored, held = lasting.tensors(compiled.weights)
        made = replace(manifest(program, target, weights=names, steady=True), derived=lasting.derived(compiled.weights))
        plan = memory_plan(program, made, stored | held, compiled.unit.arenas)
        progress(plan.notes()[0], 0, 1)
        isas = variants(compiled.unit.formats, target.architecture, target.isas)
        seconds = target.tune and target.tune * (1 - ENGINE_SHARE if target.engines else 1)
        tuning = tune(compiled.problems, isas, target, compiler, seconds=seconds, progress=progress)
        regions = list(compiled.unit.regions.values())
        seconds = target.tune and target.tune * ENGINE_SHARE
        claims = claim(regions, isas, target, compiler, seconds=seconds, progress=progress)
        isas, self.fusions = tuning.isas, compiled.fusions
        self.notes = [*plan.notes(), *tuning.notes, *claims.notes]
        self.facts = {"memory": plan.to_dict()}
        progress("compile", 0, len(isas))
        with ThreadPoolExecutor(knobs.threads()) as pool:
            jobs = [
                pool.submit(
                    build_shared,
                    compiled.unit.text(isa, claims.on(isa)),
                    folder / "code" / f"{isa.name}.so",
                    isa,
                    compiler=compiler,
                )
                for isa in isas
            ]
            try:
                write_tensors(folder / "weights.safetensors", stored)
                for done, job in enumerate(jobs):
                    job.result()
                    progress("compile", done + 1, len(isas))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        write_table(folder, compiled.unit.costs)
        write_problems(folder, compiled.problems, tuning)
        return replace(made, isas=tuple(isa.name for isa in isas), arch=target.architecture)
