"""Conformance: every op agrees with float64, on every backend and every instruction set of this machine."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import operator
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sylvester.backends import cpu_runtime, reference
from sylvester.backends.cpu import Cpu
from sylvester.codegen import compile as compilation
from sylvester.codegen.lowering import LOWERINGS
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import NAME, read
from sylvester.compiler.ops import OPS, Example, Op
from sylvester.compiler.program import Program
from sylvester.compiler.progress import silent
from sylvester.compiler.target import Target
from tests import aten_program
from tests.aten_cases import CASES
from tests.kernel_harness import supported
from tests.programs import program
from tests.sampling import SIZES, Case, Sample, sample

RELATIVE = 1e-5
dialect = torch.ops.sylvester
KEPT_WIDER = {
    dialect.linear_bf16.default: 4e-2,
    dialect.attention_bf16.default: 8e-2,
    dialect.attention_int8.default: 2e-1,
}
"""Relative error of ops whose operands the reference rounds and a variant without such products does not."""
ROUNDS_INSIDE = {dialect.attention_bf16.default: 4e-2, dialect.attention_int8.default: 1e-1}
"""Relative error of ops that round computed values: near a tie float32 and float64 go different ways."""
VARIANTS = 3
MULTIPLES = (1, 1, 3, 5, 7)
WITHOUT_CASE = {operator.getitem}
"""Lowerings that every case of an op with several results runs."""


def shapes(example: Example) -> list[tuple[int, ...]]:
    return [s.shape for s in map(sample, example) if isinstance(s, Sample)]


def variants(op: Op, example: Example) -> Iterator[Case]:
    """The example, and the same with sizes multiplied by odd numbers, where the op accepts that."""
    draw = random.Random(0)
    seen = set()
    for _ in range(200):
        factors = {n: draw.choice(MULTIPLES) if seen else 1 for n in sorted(set(itertools.chain(*shapes(example))))}
        case = Case(op.target, tuple(_scaled(sample(a), factors) for a in example))
        key = tuple(s.shape for s in case.samples)
        if key not in seen and len(seen) < VARIANTS and _accepted(case):
            seen.add(key)
            yield case


def _scaled(argument: object, factors: dict[int, int]) -> object:
    if not isinstance(argument, Sample):
        return argument
    return dataclasses.replace(argument, shape=tuple(n * factors[n] for n in argument.shape))


def _accepted(case: Case) -> bool:
    try:
        case.call(case.tensors(SIZES[0]), SIZES[0], wide=True)
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
        return False
    return True


def named(prefix: str, cases: Iterator[Case]) -> dict[str, Case]:
    return {f"{prefix}{n}": case for n, case in enumerate(cases)}


ATEN = named("aten", iter(CASES))
NOT_NATIVE = {
    dialect.all_reduce.default,
    *(getattr(dialect, name).default for name in ("linear_fp16", "widen_fp16", "linear_fp8", "dequantize_fp8")),
}
"""Ops that run in PyTorch and on GPUs only: sums over processes, weights in float16 and float8."""
DIALECT = named("dialect", (v for op in OPS.values() for example in op.examples for v in variants(op, example)))
ALL = ATEN | {name: case for name, case in DIALECT.items() if case.target not in NOT_NATIVE}


@pytest.fixture(scope="module")
def whole() -> Program:
    return aten_program.program(ALL.items())


@pytest.fixture(scope="module")
def engines(
    whole: Program, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, cpu_runtime.Engine]]:
    """An engine per instruction set; the test processes of one run share the build."""
    folder = _shared_folder(request, tmp_path_factory)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / NAME).exists():
            Cpu().build(whole, Target("cpu"), folder, silent).seal(folder)
    manifest = read(folder)
    loaded = {}
    with pytest.MonkeyPatch.context() as patch:
        for isa in (isa for isa in supported("bf16", "q8", "q4") if isa.name in manifest.isas):
            patch.setenv(knobs.ISA.name, isa.name)
            loaded[isa.name] = cpu_runtime.load(folder, manifest, 2)
    yield loaded
    for engine in loaded.values():
        engine.close()


def _shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    worker = getattr(request.config, "workerinput", None)
    if worker is None:
        return tmp_path_factory.mktemp("conformance")
    folder = tmp_path_factory.getbasetemp().parent / f"conformance-{worker['testrunuid']}"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def reference_runner(tmp_path_factory: pytest.TempPathFactory) -> reference.ReferenceRunner:
    folder = tmp_path_factory.mktemp("reference")
    manifest = reference.Reference().build(aten_program.program(DIALECT.items()), Target("reference"), folder, silent)
    return reference.load(folder, manifest)


def inputs(case: Case, tensors: list[Tensor]) -> dict[str, object]:
    given = {f"x{k}": t.numpy() for k, (s, t) in enumerate(zip(case.samples, tensors, strict=True)) if not s.weight}
    return given if case.samples else {"x0": torch.zeros(1).numpy()}


def drawn(case: Case, sizes: dict[str, int], weights: list[Tensor]) -> list[Tensor]:
    """Random inputs of these sizes, and the weights that were compiled in."""
    fresh = case.tensors(sizes, seed=sizes["n"])
    return [old if s.weight else new for s, old, new in zip(case.samples, weights, fresh, strict=True)]


def check(found: list[Tensor], expected: list[Tensor], where: object, relative: float = RELATIVE) -> None:
    assert len(found) == len(expected)
    for actual, exact in zip(found, expected, strict=True):
        dtype = torch.float32 if exact.dtype == torch.float64 else exact.dtype
        scale = exact.double().abs().nan_to_num(0.0, 0.0, 0.0).max()
        assert actual.dtype == dtype, where
        torch.testing.assert_close(
            actual,
            exact.to(dtype),
            rtol=relative,
            atol=float(relative / 10 * scale),
            equal_nan=True,
            msg=lambda m: f"{where}: {m}",
        )


@pytest.mark.parametrize("name", ALL, ids=lambda name: f"{name}-{ALL[name].target}")
def test_cpu_agrees_with_float64(name: str, engines: dict[str, cpu_runtime.Engine]) -> None:
    case = ALL[name]
    weights = case.tensors(SIZES[0])
    for sizes in SIZES if case.symbolic else SIZES[:1]:
        tensors = drawn(case, sizes, weights)
        expected = case.call(tensors, sizes, wide=True)
        for isa, engine in engines.items():
            found = engine.run(name, inputs(case, tensors))
            relative = KEPT_WIDER.get(case.target, RELATIVE)
            check([torch.from_numpy(a) for a in found.values()], expected, (isa, sizes, case), relative)


@pytest.mark.parametrize("name", DIALECT, ids=lambda name: f"{name}-{DIALECT[name].target}")
def test_reference_agrees_with_float64(name: str, reference_runner: reference.ReferenceRunner) -> None:
    case = DIALECT[name]
    tensors = case.tensors(SIZES[0])

    found = reference_runner.run(name, inputs(case, tensors))

    expected, relative = case.call(tensors, SIZES[0], wide=True), ROUNDS_INSIDE.get(case.target, RELATIVE)
    check([torch.from_numpy(a) for a in found.values()], expected, case, relative)


def test_every_lowering_has_a_case() -> None:
    covered = {case.target for case in ALL.values()} | WITHOUT_CASE

    assert sorted(str(target) for target in LOWERINGS if target not in covered) == []


def test_every_module_of_lowerings_is_registered() -> None:
    folder = Path(compilation.__file__).parent
    registering = {path.stem for path in folder.glob("*.py") if "\n@lowers(" in path.read_text()}

    assert registering <= {module.__name__.rpartition(".")[2] for module in compilation.REGISTERED}


def test_every_dialect_op_has_several_shapes() -> None:
    counts = {op.name: sum(case.target is op.target for case in DIALECT.values()) for op in OPS.values()}

    assert min(counts.values()) >= VARIANTS, counts


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.unique(x),
    ],
)
def test_results_of_unknown_size_are_refused(function: object) -> None:
    with pytest.raises(Unsupported):
        compilation.compile_program(program(function, torch.randn(4, 5)))
