"""What runs where: every model of the zoo x passes x targets, compiled and compared with the model in PyTorch.

    python -m benchmarks.support [--models llama-gqa bert] [--json out/support.json] [--page docs/support.md]

A cell holds the largest difference over the largest value, at the traced sizes and at others, or the reason of a
refusal. Finished cells are kept in the JSON file, so that an interrupted run goes on. wasm cells need Node.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

import sylvester as sv
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program
from sylvester.compiler.registry import table
from sylvester.passes import RotateHadamard
from tests import zoo

Inputs = dict[str, torch.Tensor]
PASSES: dict[str, tuple[Any, ...]] = {
    "exact": (),
    "bf16": ("bf16",),
    "w8a8": ("w8a8",),
    "w4a8": ("w4a8",),
    "rotated w4a8": (RotateHadamard(), "w4a8"),
}
SCRIPT = """const model = await sylvester.load(folder, { tune: false });
const found = [];
for (const inputs of given.inputs) {
  for (const tensor of Object.values(inputs))
    tensor.data = tensor.dtype === "int64" ? BigInt64Array.from(tensor.data, BigInt) : Float32Array.from(tensor.data);
  found.push(Object.values(await model.run(inputs)).map(({ data }) => data));
}
model.dispose();
return found;"""


@dataclass(frozen=True)
class Cell:
    """One model with passes on a target."""

    model: str
    passes: str
    target: str
    result: str

    @property
    def key(self) -> str:
        return f"{self.model} {self.passes} {self.target}"


def on_cpu(program: Program, passes: tuple[Any, ...], calls: list[Inputs], folder: Path) -> list[list[np.ndarray]]:
    with sv.compile(program, target=sv.Target("cpu", isas=("scalar",)), passes=passes, threads=1) as compiled:
        return [_arrays(compiled(**inputs)) for inputs in calls]


def in_node(program: Program, passes: tuple[Any, ...], calls: list[Inputs], folder: Path) -> list[list[np.ndarray]]:
    from tests.web import node

    sv.compile(program, target=sv.Target("wasm", isas=("simd128",)), passes=passes).save(folder)
    plain = [{name: _plain(tensor) for name, tensor in inputs.items()} for inputs in calls]
    return [[np.array(flat, np.float64) for flat in outputs] for outputs in node(folder, SCRIPT, inputs=plain)]


def in_onnxruntime(
    program: Program, passes: tuple[Any, ...], calls: list[Inputs], folder: Path
) -> list[list[np.ndarray]]:
    with sv.compile(program, target="onnx", passes=passes) as compiled:
        return [_arrays(compiled(**inputs)) for inputs in calls]


TARGETS: dict[str, Callable[..., list[list[np.ndarray]]]] = {
    "cpu": on_cpu, "wasm": in_node, "onnx": in_onnxruntime,
}  # fmt: skip


def cells(name: str, known: dict[str, str]) -> list[Cell]:
    case = zoo.case(name)
    wanted = [(p, t) for t in TARGETS if t in table("targets") for p in PASSES if f"{name} {p} {t}" not in known]
    if not wanted:
        return []
    program = sv.trace(case.model, case.inputs)
    calls = [case.inputs, *case.other]
    with torch.no_grad():
        expected = [_arrays(case.model(**inputs)) for inputs in calls]
    return [Cell(name, p, t, _cell(program, p, t, calls, expected)) for p, t in wanted]


def _cell(program: Program, passes: str, target: str, calls: list[Inputs], expected: list[list[np.ndarray]]) -> str:
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = TARGETS[target](program, PASSES[passes], calls, Path(folder, "artefact"))
    except CompileError as error:
        return f"refused: {error.message.splitlines()[0]}"
    pairs = [(f, e) for fs, es in zip(found, expected, strict=True) for f, e in zip(fs, es, strict=True)]
    return f"{max(float(np.abs(f.reshape(e.shape) - e).max() / np.abs(e).max()) for f, e in pairs):.0e}"


def _arrays(outputs: Any) -> list[np.ndarray]:
    values = pytree.tree_leaves(outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs)
    return [np.asarray(v, np.float64) for v in values if isinstance(v, torch.Tensor | np.ndarray)]


def _plain(tensor: torch.Tensor) -> dict[str, Any]:
    return {"data": tensor.flatten().tolist(), "shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[1]}


def page(known: dict[str, str]) -> str:
    """The table as Markdown; reasons of refusals below it."""
    columns = [(t, p) for t in TARGETS for p in PASSES if any(k.endswith(f" {p} {t}") for k in known)]
    reasons: dict[str, int] = {}
    lines = ["| model | " + " | ".join(f"{t}: {p}" for t, p in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in zoo.NAMES:
        found = [known.get(f"{name} {p} {t}", "") for t, p in columns]
        if any(found):
            lines.append(f"| {name} | " + " | ".join(_short(cell, reasons) for cell in found) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([HEAD, *lines, "", *notes]) + "\n"


def _short(cell: str, reasons: dict[str, int]) -> str:
    if not cell.startswith("refused: "):
        return cell
    return f"refused ({reasons.setdefault(cell.removeprefix('refused: '), len(reasons) + 1)})"


HEAD = """# What runs where

Made by `python -m benchmarks.support`: the models of the tests, small and with random weights, compiled with these
passes for these targets. A number is the largest difference to the model in PyTorch over the largest value, at the
traced sizes and at others; lossy passes move random weights more than trained ones. A refusal has its reason below.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(zoo.NAMES), choices=zoo.NAMES)
    parser.add_argument("--json", type=Path, default=Path("out/support.json"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, str] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.models:
        for cell in cells(name, known):
            known[cell.key] = cell.result
            print(cell.key, cell.result, flush=True)
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main()
