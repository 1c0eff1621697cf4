"""WebAssembly for a page or Node: the C plan with SIMD128 and relaxed SIMD, alone and threaded; weights in shards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from sylvester.backends.base import Backend
from sylvester.backends.float_types import require_float32
from sylvester.backends.kernel_table import write_table
from sylvester.backends.memory_plan import memory_plan
from sylvester.backends.packed_weights import stored_tensors
from sylvester.backends.shards import write_shards
from sylvester.backends.signature import manifest
from sylvester.backends.toolchain import Compiler, build_shared, find_compiler, version
from sylvester.backends.web_bundle import write_bundle
from sylvester.backends.web_tokenizer import PACKAGE as TOKENIZER
from sylvester.backends.web_tuning import candidate_modules, write_problems
from sylvester.codegen.compile import Compiled, compile_program
from sylvester.codegen.isa import WASM, Isa, of, variants
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.target import Target

PAGE = (1 << 32) - (1 << 16)
"""Bytes that 32-bit addresses reach in whole pages."""
CODE = 4 << 20
"""Bytes for the data of a module, stacks and scratch space of threads."""
PROMPT = 256
"""Tokens of a prompt that are read at once, which bounds the arena."""


class Wasm(Backend):
    name: ClassVar[str] = "wasm"

    def identity(self, target: Target) -> tuple[str, ...] | None:
        return ("wasm", version(_compiler()), *(["text"] if TOKENIZER.available() else []))

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        require_float32(program, self.name)
        compiled = compile_program(program)
        names = {entry: [use.name for use in uses] for entry, uses in compiled.weights.items()}
        stored = stored_tensors(program, compiled.weights)
        made = manifest(program, target, weights=names, steady=True)
        plan = memory_plan(program, made, stored, compiled.unit.arenas, rows=1)
        needed = CODE + plan.weights + plan.longest_arena + plan.state
        if needed > PAGE:
            raise Unsupported(
                f"the page would take {needed / 1e6:.0f} MB of memory (weights {plan.weights / 1e6:.0f}, caches "
                f"{plan.state / 1e6:.0f}, activations {plan.longest_arena / 1e6:.0f}), 32-bit addresses reach "
                f"{PAGE / 1e6:.0f} MB",
                hint="compile with fewer bits (passes='w4a8'), or a shorter Target('wasm', max_length=...)",
            )
        self.notes = [
            f"memory: a page takes {needed / 1e6:.1f} MB (weights {plan.weights / 1e6:.1f}, caches "
            f"{plan.state / 1e6:.1f}, activations {plan.longest_arena / 1e6:.1f})"
        ]
        progress(self.notes[0], 0, 1)
        self.facts, self.fusions = {"memory": plan.to_dict() | {"page": needed}}, compiled.fusions
        isas = variants(compiled.unit.formats, WASM, target.isas or [isa.name for isa in of(WASM)])
        write_shards(folder, stored)
        _build(compiled, isas, folder, progress)
        write_problems(folder, compiled.panels, isas)
        write_table(folder, compiled.unit.costs)
        self.notes += write_bundle(program, folder)
        return replace(made, isas=tuple(isa.name for isa in isas), arch=WASM)


def _compiler() -> Compiler:
    return find_compiler("ziglang", architecture=WASM)


def _build(compiled: Compiled, isas: tuple[Isa, ...], folder: Path, progress: Progress) -> None:
    build = partial(build_shared, compiler=_compiler())
    code = folder / "code"
    modules = [(compiled.unit.text(isa), code / f"{isa.name}.wasm", isa, False) for isa in isas]
    for isa in isas:
        texts = candidate_modules(compiled.panels, isa)
        modules += [(text, code / "tuning" / f"{isa.name}-{name}.wasm", isa, True) for name, text in texts.items()]
    progress("compile", 0, len(modules))
    with ThreadPoolExecutor(knobs.threads()) as pool:
        jobs = [pool.submit(build, text, out, isa, beside=beside) for text, out, isa, beside in modules]
        try:
            for done, job in enumerate(as_completed(jobs)):
                job.result()
                progress("compile", done + 1, len(modules))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
