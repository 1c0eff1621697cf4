"""ONNX graphs for onnxruntime and other runtimes: one file per entry, one file of weights for all."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sylvester.backends.base import Backend
from sylvester.backends.float_types import require_float32
from sylvester.backends.onnx import parity
from sylvester.backends.onnx.builder import Builder
from sylvester.backends.onnx.options import IR_VERSION, Options
from sylvester.backends.onnx.properties import Properties, write_properties
from sylvester.backends.onnx.runtime import Graphs
from sylvester.backends.onnx.translate import Translator, require_translations
from sylvester.backends.onnx.weights import FILE, Store
from sylvester.backends.signature import manifest
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Manifest, sha256
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.stages import DRAFT
from sylvester.compiler.target import Target

REGISTERED = tuple(
    importlib.import_module(f"sylvester.backends.onnx.{name}")
    for name in (
        "activations",
        "attention",
        "gated",
        "low_bit",
        "pointwise",
        "pooling",
        "products",
        "reductions",
        "rotary",
        "rotations",
        "shared",
        "skips",
        "sparse",
        "views",
    )
)
"""The modules that register translations."""
LIMIT_32_BIT = 2**31 - 1
"""Bytes that an array in a page may hold."""
UNVERIFIED = "generation drafts nothing: onnxruntime rounds tokens that come together otherwise than single ones"
VERSION = metadata.version("sylvester")
GRAPH_LIMIT = 2**31 - 1
"""Bytes of a protobuf message: a graph without its weights."""


class Onnx(Backend):
    name: ClassVar[str] = "onnx"
    options: ClassVar[tuple[str, ...]] = tuple(Options.__dataclass_fields__)

    def identity(self, target: Target) -> tuple[str, ...] | None:
        runtime = metadata.version("onnxruntime") if find_spec("onnxruntime") else ""
        return ("onnx", ir.__version__, runtime)

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        options = Options.parse(target.options)
        require_float32(program, self.name)
        require_translations(program)
        store = Store(program, folder)
        written: dict[str, tuple[Builder, ir.Model]] = {}
        try:
            for number, (name, entry) in enumerate(program.entries.items()):
                progress(f"onnx {name}", number, len(program.entries))
                written[name] = _graph(Builder(name, program, entry, options, store))
        finally:
            store.close()
        digest = sha256(folder / FILE)
        for name, (builder, model) in written.items():
            model.metadata_props.update(_facts(builder, program, digest))
            _save(model, folder / f"{name}.onnx")
        properties = {n: Properties(b.row_by_row, 1 if b.exact_rows else None) for n, (b, _) in written.items()}
        write_properties(folder, properties)
        made = manifest(program, target)
        self.notes = [*self._size(store), *([UNVERIFIED] if DRAFT in program.info else [])]
        self.facts = {"onnx": {"opset": options.opset, "ops": options.ops, "weights": store.unique}}
        self._compare(program, Graphs(folder, made, threads=1), written)
        return made

    def _size(self, store: Store) -> list[str]:
        if store.unique <= LIMIT_32_BIT:
            return []
        return [f"the weights take {store.unique / 1e9:.1f} GB: a page in 32-bit WebAssembly cannot load them"]

    def _compare(self, program: Program, graphs: Graphs, written: Mapping[str, tuple[Builder, ir.Model]]) -> None:
        """Run every graph beside its entry, unless checks are off or there is no onnxruntime; it is in the report."""
        if knobs.CHECK.get() == "0" or not find_spec("onnxruntime"):
            missing = "" if find_spec("onnxruntime") else ", as there is no onnxruntime"
            self.notes = [*self.notes, f"parity was not measured{missing}"]
            return
        agreements, skipped = parity.compare(program, graphs)
        models = {name: (model, builder.values) for name, (builder, model) in written.items()}
        parity.require(program, graphs, agreements, models)
        graphs.close()
        worst = max(agreements, key=lambda a: a.error / a.tolerance, default=None)
        self.facts = {**self.facts, "parity": parity.described(agreements)}
        if worst is not None:
            skipped = [f"parity: errors of at most {worst.error:.1e}, {worst.tolerance:.0e} allowed", *skipped]
        self.notes = [*self.notes, *skipped]


def _graph(builder: Builder) -> tuple[Builder, ir.Model]:
    graph, version = Translator(builder).run(), IR_VERSION[builder.opset]
    model = ir.Model(graph, ir_version=version, producer_name="sylvester", producer_version=VERSION)
    RemoveUnusedNodesPass()(model)
    return builder, model


def _save(model: ir.Model, path: Path) -> None:
    proto = ir.to_proto(model)
    size = proto.ByteSize()
    if size > GRAPH_LIMIT:
        raise Unsupported(f"the graph {path.name} takes {size / 1e9:.1f} GB without its weights, a file holds 2 GB")
    path.write_bytes(proto.SerializeToString())
    check(path)


def check(path: Path) -> None:
    """`onnx.checker` on the file; what it finds is a fault of this package."""
    import onnx

    onnx.checker.check_model(str(path))


def _facts(builder: Builder, program: Program, digest: str) -> dict[str, str]:
    """What `metadata_props` says of a graph."""
    return {
        "sylvester.version": VERSION,
        "sylvester.entry": builder.name,
        "sylvester.ops": builder.options.ops,
        "sylvester.passes": json.dumps(_passes(program)),
        "sylvester.weights": FILE,
        "sylvester.weights.sha256": digest,
    }


def _passes(program: Program) -> list[str]:
    """The passes that made nodes of the program, by name."""
    made = (name for _, node in program.nodes() for name in node.meta.get("made_by", ()))
    return list(dict.fromkeys(made))
