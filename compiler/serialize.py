"""Save a Program as a folder and load it: program.json, weights and examples as safetensors; nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from sylvester.compiler import schema
from sylvester.compiler.document import (
    FORMAT,
    Document,
    EntrySpec,
    NodeSpec,
    Origin,
    OutputSpec,
    PlaceholderSpec,
    SlotSpec,
)
from sylvester.compiler.encoding import decode, encode, operator_name, resolve
from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.program import Binding, Entry, Output, Program, StateSlot, binding, fake_empty, value
from sylvester.compiler.sizes import Size, evaluate
from sylvester.compiler.symbols import fresh_symbols, size_text, symbols_of
from sylvester.compiler.verify import verify
from sylvester.compiler.weights import ParameterStore

PROGRAM, WEIGHTS, EXAMPLES = "program.json", "weights.safetensors", "examples.safetensors"


EDITED = "the file was edited or written by another version; save the program again"


def save(program: Program, folder: str | Path) -> None:
    """Write the program; every op must be resolvable by name and `info` be plain JSON, else `CompileError`."""
    folder = Path(folder)
    origins: dict[Origin, int] = {}
    entries = {name: _entry_spec(entry, origins) for name, entry in program.entries.items()}
    state = {key: SlotSpec(slot.index, *_type(slot)) for key, slot in program.state.items()}
    document = Document(FORMAT, symbols_of(program), entries, state, tuple(origins), program.info)
    try:
        text = json.dumps(asdict(document), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CompileError(f"the program holds what is not JSON: {error}", hint="keep `info` plain") from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_text(text, encoding="utf-8")
    program.weights.save(folder / WEIGHTS)
    examples = {f"{n}/{k}": t.contiguous().clone() for n, e in program.entries.items() for k, t in e.examples.items()}
    save_file(examples, folder / EXAMPLES)


def load(folder: str | Path) -> Program:
    """Read a program back: facts are derived again, the result is verified. Raises `ArtefactError` naming the file."""
    folder = Path(folder)
    document = _read(folder / PROGRAM)
    weights = _tensors(folder / WEIGHTS, ParameterStore.load)
    examples = _tensors(folder / EXAMPLES, load_file)
    try:
        program = _build(document, weights, examples)
        verify(program)
    except (CompileError, schema.SchemaError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"{str(folder / PROGRAM)!r} does not describe a program: {error}", hint=EDITED) from error
    return program


def _read(path: Path) -> Document:
    if not path.exists():
        raise ArtefactError(f"there is no {path.name} in {str(path.parent)!r}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{str(path)!r} is truncated or not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ArtefactError(f"{str(path)!r} has format {found!r}, expected {FORMAT}", hint=EDITED)
    try:
        return schema.load(Document, data)
    except schema.SchemaError as error:
        raise ArtefactError(f"{str(path)!r} is malformed: {error}", hint=EDITED) from error


def _tensors(path: Path, reader: Any) -> Any:
    if not path.exists():
        raise ArtefactError(f"there is no {path.name} in {str(path.parent)!r}")
    try:
        return reader(path)
    except SafetensorError as error:
        raise ArtefactError(f"{str(path)!r} is truncated or not a safetensors file: {error}") from error


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return found


def _type(holder: StateSlot | Tensor) -> tuple[tuple[Size, ...], str]:
    return tuple(size_text(n) for n in holder.shape), _dtype_name(holder.dtype)


def _entry_spec(entry: Entry, origins: dict[Origin, int]) -> EntrySpec:
    results = zip(entry.outputs, entry.results(), strict=True)
    return EntrySpec(
        tuple(PlaceholderSpec(n.name, binding(n).kind, binding(n).key, *_type(value(n))) for n in entry.placeholders()),
        tuple(_node_spec(n, origins) for n in entry.calls()),
        tuple(OutputSpec(o.kind, o.name, n.name) for o, n in results),
    )


def _node_spec(node: fx.Node, origins: dict[Origin, int]) -> NodeSpec:
    origin = origins.setdefault(Origin.of(node), len(origins))
    return NodeSpec(node.name, operator_name(node), encode(node.args, node), encode(dict(node.kwargs), node), origin)


def _build(document: Document, weights: ParameterStore, examples: Mapping[str, Tensor]) -> Program:
    mode, symbols = fresh_symbols(document.symbols)
    state = {key: StateSlot(s.index, _shape(s.shape, symbols), _dtype(s.dtype)) for key, s in document.state.items()}
    origins = [origin.meta() for origin in document.origins]
    entries = {name: _entry(spec, mode, symbols, origins) for name, spec in document.entries.items()}
    for key, tensor in examples.items():
        name, _, given = key.partition("/")
        entries[name].examples[given] = tensor
    return Program(weights, entries, state, dict(document.info))


def _shape(sizes: tuple[Size, ...], symbols: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(evaluate(size, symbols) for size in sizes)


def _entry(spec: EntrySpec, mode: FakeTensorMode, symbols: Mapping[str, Any], origins: list[dict[str, Any]]) -> Entry:
    graph = fx.Graph()
    entry = Entry(graph, [Output(cast(Any, o.kind), o.name) for o in spec.outputs])
    nodes: dict[str, fx.Node] = {}
    for p in spec.placeholders:
        node = nodes[p.name] = graph.create_node("placeholder", p.name, name=p.name)
        node.meta["bind"] = Binding(cast(Any, p.kind), p.key)
        node.meta["val"] = fake_empty(mode, _shape(p.shape, symbols), _dtype(p.dtype))
    for call in spec.nodes:
        args, kwargs = tuple(decode(call.args, nodes)), decode(call.kwargs, nodes)
        node = nodes[call.name] = graph.create_node("call_function", resolve(call.target), args, kwargs, name=call.name)
        node.meta = dict(origins[call.origin])
        node.meta["val"] = entry.fact(cast(Any, node.target), args, kwargs)
    graph.output(tuple(nodes[o.node] for o in spec.outputs))
    return entry
