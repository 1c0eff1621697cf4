"""ExportedProgram -> Program: placeholders bound to inputs and to one weight store, outputs named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from sylvester.compiler.diagnose import quiet
from sylvester.compiler.errors import TraceError
from sylvester.compiler.functional import Copier, NeedsFunctionalization, fill_origins, settled
from sylvester.compiler.program import Binding, Entry, Output, Program, value
from sylvester.compiler.verify import verify
from sylvester.compiler.weights import merge_tied

WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def to_program(exported: ExportedProgram, examples: Mapping[str, Tensor], *, gradients: bool = False) -> Program:
    """A program with the entry `forward`, whose inputs are named by the keys of `examples`, in order.

    In-place operations become functional ones locally, or else by torch's own functionalisation, which is slower.
    With `gradients`, what the model computes under `torch.no_grad()` has none.
    """
    try:
        program = _copy(exported, examples, gradients)
    except NeedsFunctionalization:
        with quiet():
            exported = exported.run_decompositions({})
        try:
            program = _copy(exported, examples, gradients)
        except NeedsFunctionalization as error:
            raise TraceError("cannot make an in-place operation functional", at=error.node) from error
    program.sweep()
    _require_known_sizes(program.main)
    verify(program)
    return program


def _require_known_sizes(entry: Entry) -> None:
    """Every size follows from those of the inputs."""
    for node in entry.calls():
        sizes = value(node).shape if isinstance(value(node), Tensor) else ()
        if any(isinstance(n, SymInt) and n.node.hint is None for n in sizes):
            hint = "keep all elements and mark them with torch.where, or move the selection out of the model"
            raise TraceError(f"a size of %{node.name} depends on the values of a tensor", at=node, hint=hint)


def _copy(exported: ExportedProgram, examples: Mapping[str, Tensor], gradients: bool) -> Program:
    _refuse_side_effects(exported)
    weights = merge_tied({**exported.state_dict, **_constants(exported)})
    graph = fx.Graph()
    entry = Entry(graph, [], dict(examples))
    values = _placeholders(exported, entry, list(examples), weights.resolve)
    for node in exported.graph.find_nodes(op="get_attr"):
        attribute = getattr(exported.graph_module, node.target)
        if isinstance(attribute, Tensor):
            key = weights.fresh(node.target)
            weights[key] = attribute
            values[node] = entry.bind("weight", key, attribute)
    everything = Copier(graph, values, gradients).body(exported.graph_module)
    specs = exported.graph_signature.output_specs
    results = [r for r, spec in zip(everything, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    kind, names = _structure(exported, len(results))
    kept = [(name, node) for name, node in zip(names, results, strict=True) if _is_tensor(node)]
    if not kept:
        raise TraceError("the model returns no tensor")
    graph.output(tuple(node for _, node in kept))
    entry.outputs = [Output("output", name) for name, _ in kept]
    fill_origins(graph)
    return Program(weights, {"forward": entry}, info={"output_type": kind, "notes": []})


def _constants(exported: ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in exported.constants.items() if isinstance(tensor, Tensor)}


def _is_tensor(result: object) -> bool:
    return isinstance(result, fx.Node) and isinstance(value(result), Tensor)


def _refuse_side_effects(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION):
            raise TraceError(f"forward writes to {spec.target!r}", hint="return the new value instead of storing it")


def _placeholders(
    exported: ExportedProgram, entry: Entry, names: list[str], resolve: Callable[[str], str]
) -> dict[fx.Node, Any]:
    """Bind every placeholder: tied weights to one, user inputs to their names."""
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    values: dict[fx.Node, Any] = {}
    bound: dict[Binding, fx.Node] = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, TensorArgument):
            values[node] = getattr(spec.arg, "value", None)
            continue
        if spec.kind not in (InputKind.USER_INPUT, *WEIGHTS):
            raise TraceError(f"the model holds a {spec.kind.name.lower()} {spec.target!r}, expected tensors only")
        target = Binding("weight", resolve(spec.target)) if spec.kind in WEIGHTS else Binding("input", names.pop(0))
        if target not in bound:
            bound[target] = entry.graph.placeholder(node.name)
            bound[target].meta = {"val": settled(node.meta["val"]), "bind": target}
        values[node] = bound[target]
    return values


def _structure(exported: ExportedProgram, leaves: int) -> tuple[str, list[str]]:
    """How outputs are packed ("tensor", "tuple", "dict") and the name of each leaf; a nested one is "outer.inner"."""
    spec = exported.call_spec.out_spec
    if spec is None or spec.is_leaf():
        return "tensor", ["out0"]
    try:
        whole = pytree.tree_unflatten(list(range(leaves)), spec)
    except Exception:
        return "tuple", [f"out{i}" for i in range(leaves)]
    kind = "dict" if isinstance(whole, Mapping) else "tuple"
    named = dict(_leaves(whole, "" if kind == "dict" else "out", ""))
    return kind, [named[i] for i in range(leaves)]


def _leaves(tree: Any, prefix: str, separator: str) -> Iterator[tuple[int, str]]:
    if isinstance(tree, Mapping):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, tuple | list):
        items = list(enumerate(tree))
    else:
        yield tree, prefix
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}{separator}{key}", ".")
