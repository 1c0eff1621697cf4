"""What must hold for every graph without a C compiler: capture, facts, passes, saving, printing, rows."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import sylvester as sv
from sylvester.compiler import cost, registry, samples, serialize
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program, binding, value
from sylvester.compiler.resolve import expand, resolve_passes
from sylvester.compiler.row_dependence import batch_symbol, dependence
from sylvester.compiler.verify import verify
from tests.fuzz.graphs import Case, Model
from tests.fuzz.values import Expected, Mismatch, expected
from tests.sampling import SIZES

OPTIONS = (
    "quantize(weights=8, activations=8)",
    "quantize(weights=4, activations=8, group=32)",
    "quantize(weights=4, group=32, method='gptq')",
    "quantize(weights=3, group=32)",
    "quantize-attention(products='bf16')",
    "sparsify-activations(phase='all')",
    "share-blocks(groups=((0, 1),))",
)
"""Passes as a user writes them, besides every registered pass with its defaults."""
MIXING = ("rotate-hadamard",)
"""Passes that keep finite values only: rotated, an infinity spoils every feature of its row."""
Oracle = Callable[[Case, Counter[str]], None]


def passes() -> list[str]:
    return [*registry.table("passes"), *OPTIONS]


def check_meaning(case: Case, counts: Counter[str]) -> None:
    """The graph in PyTorch, in every turn of sizes, agrees with float64; facts say the shapes and types that come."""
    for turn in case.turns:
        _compare(case.program, case, turn, f"eager, turn {turn}")
    verify(case.program)
    _check_facts(case)


def _check_facts(case: Case) -> None:
    for output, node in zip(case.entry.outputs, case.entry.results(), strict=True):
        for turn in case.turns:
            found = case.program.run("forward", case.inputs(turn))[output.name]
            shape = [_at(n, case, turn) for n in value(node).shape]
            if shape != list(found.shape) or value(node).dtype != found.dtype:
                raise Mismatch(f"fact of {output.name}: {value(node).dtype}{shape}, found {found.dtype}{found.shape}")


def _at(size: int | torch.SymInt, case: Case, turn: int) -> int:
    if isinstance(size, int):
        return size
    values = {}
    for node in case.entry.placeholders("input"):
        for n, given in zip(value(node).shape, case.inputs(turn)[binding(node).key].shape, strict=True):
            if isinstance(n, torch.SymInt):
                values[n.node.expr] = given
    return int(size.node.expr.subs(values))


def _compare(program: Program, case: Case, turn: int, where: str) -> None:
    wanted = wanted_of(case, turn)
    found = program.run("forward", case.inputs(turn))
    if set(found) != set(wanted):
        raise Mismatch(f"{where}: outputs are {sorted(found)}, expected {sorted(wanted)}")
    for name, want in wanted.items():
        want.require(found[name], f"{where}, output {name}")


def wanted_of(case: Case, turn: int) -> dict[str, Expected]:
    """What the outputs should be, worked out once."""
    if turn not in case.wanted:
        case.wanted[turn] = expected(case.program, case.inputs(turn))
    found: dict[str, Expected] = case.wanted[turn]
    return found


def check_trace(case: Case, counts: Counter[str]) -> None:
    """Capturing the module gives a program that computes what the module does."""
    if not case.inputs(0):
        return
    model = Model(case.graph)
    inputs = case.inputs(0)
    program = sv.trace(model, tuple(inputs.values()))
    given = dict(zip((binding(n).key for n in program.main.placeholders("input")), inputs.values(), strict=True))
    wanted = wanted_of(case, 0)
    found = program.run(next(iter(program.entries)), given)
    for (name, want), tensor in zip(wanted.items(), found.values(), strict=True):
        want.require(tensor, f"traced, output {name}")


def check_saving(case: Case, counts: Counter[str]) -> None:
    """Saved and loaded, the program reads and computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        serialize.save(case.program, folder)
        loaded = serialize.load(Path(folder))
    for turn in case.turns:
        _compare(loaded, case, turn, f"loaded, turn {turn}")
    if str(loaded) != str(case.program):
        raise Mismatch("the loaded program reads otherwise than the saved one")


def check_printing(case: Case, counts: Counter[str]) -> None:
    """Text, networkx and costs can be made."""
    if len(str(case.program)) == 0 or case.program.to_networkx().number_of_nodes() == 0:
        raise Mismatch("nothing is printed")
    cost.program_cost(case.program)


def check_rows(case: Case, counts: Counter[str]) -> None:
    """Where a row of the batch is said to depend on itself alone, changing row 1 leaves the others as they were."""
    symbol = batch_symbol(case.entry)
    if symbol is None or dependence(case.entry) is not None:
        return
    counts["alone"] += 1
    inputs = case.inputs(0)
    axes = {binding(n).key: _axes(value(n), symbol) for n in case.entry.placeholders("input")}
    changed = {key: _changed(t, axes[key]) for key, t in inputs.items()}
    before, after = (case.program.run("forward", given) for given in (inputs, changed))
    for output, node in zip(case.entry.outputs, case.entry.results(), strict=True):
        if _merged(value(node), symbol):
            continue
        found, others = (_others(run[output.name], _axes(value(node), symbol)) for run in (after, before))
        if not torch.allclose(found.double(), others.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
            raise Mismatch(f"rows are said to be alone, but row 1 changes others in {output.name}")


def _axes(fact: Tensor, symbol: object) -> list[int]:
    return [d for d, n in enumerate(fact.shape) if isinstance(n, torch.SymInt) and n.node.expr == symbol]


def _merged(fact: Tensor, symbol: object) -> bool:
    """Whether an axis holds rows beside something else, so that no index of it is a row."""
    sizes = [n.node.expr for n in fact.shape if isinstance(n, torch.SymInt)]
    return any(symbol in size.free_symbols and size != symbol for size in sizes)


def _changed(tensor: Tensor, axes: list[int]) -> Tensor:
    tensor = tensor.clone()
    for axis in axes:
        row = tensor.select(axis, 1)
        row.copy_(tensor.select(axis, 0).clone() if not row.is_floating_point() else row * -1.5 + 0.25)
    return tensor


def _others(tensor: Tensor, axes: list[int]) -> Tensor:
    kept = torch.tensor([k for k in range(SIZES[0]["n"]) if k != 1])
    for axis in axes:
        tensor = tensor.index_select(axis, kept)
    return tensor


def check_pass(text: str) -> Oracle:
    """A pass takes the program and keeps its contract, or says why not."""

    def check(case: Case, counts: Counter[str]) -> None:
        rewritten(case, text, counts)

    return check


def rewritten(case: Case, text: str, counts: Counter[str]) -> Program | None:
    """The program after a pass; None when the pass does not take it."""
    program = case.program.clone()
    given = [case.inputs(turn) for turn in case.turns if _calibrates(case.inputs(turn))]
    after = program
    try:
        program.calibration = samples.parse(program, given) if given else None
        done = expand(resolve_passes(text), program, None).passes
        for step in done:
            step.requires(after)
            after = _applied(step, after)
    except CompileError as error:
        counts[f"refused: {text}"] += 1
        counts[f"because: {text}: {re.split('[:,]', str(error))[0][:80]}"] += 1
        return None
    verify(after)
    _check_contract(case, after, done, text)
    counts[f"taken: {text}"] += 1
    counts[f"changed: {text}"] += str(after) != str(case.program)
    return after


def _calibrates(inputs: dict[str, Tensor]) -> bool:
    """Calibration data is finite."""
    return bool(inputs) and all(bool(t.isfinite().all()) for t in inputs.values())


def _applied(step: Pass, program: Program) -> Program:
    """The program after a pass that took it; an error of the pass is a bug."""
    try:
        return Pipeline((step,), check=step.contract == "lossy")(program)
    except CompileError as error:
        raise Mismatch(f"{step} takes the program and fails: {error}") from error


def _finite(case: Case, turn: int) -> bool:
    values = case.graph.run(case.graph.tensors(turn))
    return all(bool(x.isfinite().all()) for x in values if isinstance(x, Tensor) and x.is_floating_point())


def _check_contract(case: Case, after: Program, done: Sequence[Pass], text: str) -> None:
    for turn in case.turns:
        inputs = case.inputs(turn)
        if any(p.name in MIXING for p in done) and not _finite(case, turn):
            continue
        if all(p.contract == "exact" for p in done):
            _compare(after, case, turn, f"{text}, turn {turn}")
            continue
        before, found = (p.run(next(iter(p.entries)), inputs) for p in (case.program, after))
        for name, tensor in before.items():
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise Mismatch(f"{text}, turn {turn}: {name} became {found[name].dtype}{list(found[name].shape)}")
            if tensor.isfinite().all() and not found[name].isfinite().all():
                raise Mismatch(f"{text}, turn {turn}: {name} is no longer finite")


EXACT = "canonicalize, fold-constants, raise-norms, raise-rope, raise-attention, raise-glu, canonicalize, fold-weights"


ORACLES: dict[str, Oracle] = {
    "meaning": check_meaning,
    "printing": check_printing,
    "rows": check_rows,
    "saving": check_saving,
    "trace": check_trace,
    "exact": check_pass(EXACT),
}


def oracles() -> dict[str, Oracle]:
    """Every check of one graph by name."""
    return ORACLES | {f"pass {text}": check_pass(text) for text in passes()}
