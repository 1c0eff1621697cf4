"""Many graphs as entries of one program, so that one C build checks them all: cpu, WebAssembly, reference and null."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from sylvester.backends import cpu_runtime, reference
from sylvester.backends.cpu import Cpu
from sylvester.backends.float_types import require_float32
from sylvester.backends.null import Null
from sylvester.backends.packed_weights import stored_tensors
from sylvester.backends.signature import manifest
from sylvester.backends.toolchain import build_shared
from sylvester.codegen.compile import compile_program
from sylvester.codegen.isa import SIMD128
from sylvester.compiler import binding as binds
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.manifest import read
from sylvester.compiler.program import Binding, Program, binding
from sylvester.compiler.progress import silent
from sylvester.compiler.target import Target
from sylvester.compiler.weights import ParameterStore
from tests.fuzz.graphs import Case
from tests.fuzz.values import Expected, Mismatch, expected
from tests.webassembly import FIRST, Library

Failures = dict[str, Exception]
"""Entry -> what was wrong with it."""


def refusal(program: Program) -> Unsupported | None:
    """Why no native code can be made of the program; anything but `Unsupported` is an error."""
    try:
        require_float32(program, Cpu.name)
        compile_program(program)
    except Unsupported as error:
        return error
    return None


class Bundle:
    """Programs of one entry, each under a name of its own, with the inputs and results of every turn of sizes."""

    def __init__(self) -> None:
        self.program = Program(ParameterStore(), {})
        self.cases: dict[str, Case] = {}
        self.wanted: dict[str, dict[int, dict[str, Expected]]] = {}

    def add(self, name: str, case: Case, program: Program) -> None:
        """A program that was made of the case."""
        entry = next(iter(program.entries.values())).clone()
        for node in entry.placeholders("weight"):
            key = binding(node).key
            node.meta["bind"] = Binding("weight", f"{name}/{key}")
            self.program.weights[f"{name}/{key}"] = program.weights[key]
        self.program.entries[name] = entry
        self.cases[name] = case
        same = program is case.program
        self.wanted[name] = {
            turn: case.wanted[turn]
            if same and turn in case.wanted
            else expected(program, case.inputs(turn), _only(program))
            for turn in case.turns
        }

    def calls(self) -> Iterator[tuple[str, int, dict[str, np.ndarray], dict[str, Expected]]]:
        for name, case in self.cases.items():
            for turn in case.turns:
                inputs = {key: t.numpy() for key, t in case.inputs(turn).items()}
                yield name, turn, inputs, self.wanted[name][turn]


def _only(program: Program) -> str:
    return next(iter(program.entries))


def check_bundle(bundle: Bundle, isas: Sequence[str], *, wasm: bool) -> Failures:
    """Every call on every instruction set that this machine has, in WebAssembly, and in the reference backend."""
    with TemporaryDirectory(prefix="sylvester-fuzz-") as made:
        folder = Path(made)
        failures = _on_reference(bundle, folder / "reference")
        failures = _on_cpu(bundle, isas, folder / "cpu") | failures
        if wasm:
            failures = _on_wasm(bundle, folder / "module.wasm") | failures
    Null().build(bundle.program, Target("null"), folder, silent)
    return failures


def _on_cpu(bundle: Bundle, isas: Sequence[str], folder: Path) -> Failures:
    folder.mkdir()
    Cpu().build(bundle.program, Target("cpu", isas=tuple(isas)), folder, silent).seal(folder)
    failures: Failures = {}
    for isa in isas:
        with _forced(isa):
            engine = cpu_runtime.load(folder, read(folder), 2)
        failures = _run(bundle, engine, isa) | failures
        engine.close()
    return failures


@contextmanager
def _forced(isa: str) -> Iterator[None]:
    before = os.environ.get(knobs.ISA.name)
    os.environ[knobs.ISA.name] = isa
    try:
        yield
    finally:
        os.environ.pop(knobs.ISA.name)
        if before is not None:
            os.environ[knobs.ISA.name] = before


def _on_reference(bundle: Bundle, folder: Path) -> Failures:
    made = reference.Reference().build(bundle.program, Target("reference"), folder, silent)
    return _run(bundle, reference.load(folder, made), "reference")


def _run(bundle: Bundle, engine: cpu_runtime.Engine | reference.ReferenceRunner, where: str) -> Failures:
    failures: Failures = {}
    for name, turn, inputs, wanted in bundle.calls():
        try:
            found = engine.run(name, inputs)
            require(found, wanted, f"{where}, turn {turn}")
        except (Mismatch, CompileError) as error:
            failures.setdefault(name, error)
    return failures


def require(found: Mapping[str, np.ndarray], wanted: Mapping[str, Expected], where: str) -> None:
    for key, want in wanted.items():
        want.require(torch.from_numpy(np.array(found[key])), f"{where}, output {key}")


def _on_wasm(bundle: Bundle, path: Path) -> Failures:
    """The plans with SIMD128, run by wasmtime."""
    compiled = compile_program(bundle.program)
    library = Library(build_shared(compiled.unit.text(SIMD128), path, SIMD128))
    stored = {name: _whole(t.make()) for name, t in stored_tensors(bundle.program, compiled.weights).items()}
    names = {entry: [use.name for use in uses] for entry, uses in compiled.weights.items()}
    made = manifest(bundle.program, Target("null"), weights=names)
    failures: Failures = {}
    for name, turn, inputs, wanted in bundle.calls():
        spec = made.entries[name]
        results = {key: np.zeros(want.exact.shape, _numpy(want.dtype)) for key, want in wanted.items()}
        given = [inputs[s.name] for s in spec.inputs]
        sizes = list(binds.bind(spec, given, None, made.state).values())
        library._write(FIRST, np.array([*sizes, 0], np.int64).tobytes())
        arena = np.zeros(max(int(library.exports[f"sv_arena_{name}"](library.store, FIRST)), 64), np.uint8)
        arrays = [*given, *(stored[w] for w in spec.weights), *results.values(), arena]
        code = library.call(f"sv_run_{name}", 1, sizes, arrays)
        try:
            if code:
                raise Mismatch(f"wasm, turn {turn}: the plan ended with {code}")
            require(results, wanted, f"wasm, turn {turn}")
        except Mismatch as error:
            failures.setdefault(name, error)
    return failures


def _whole(made: np.ndarray | Iterator[np.ndarray]) -> np.ndarray:
    return made if isinstance(made, np.ndarray) else np.concatenate(list(made))


def _numpy(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
