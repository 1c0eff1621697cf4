"""Programs as readable text, and the difference of two programs."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.errors import module_path
from sylvester.compiler.program import Entry, Program, binding, is_weight

SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def render(program: Program) -> str:
    """The whole program: one line per node, weights by key, facts, origin."""
    size = program.weights.nbytes / 1e6
    head = f"program: {len(program.weights)} weights ({size:.2f} MB), {len(program.state)} state slots"
    return "\n\n".join([head, *(render_entry(name, entry) for name, entry in program.entries.items())])


def render_entry(name: str, entry: Entry) -> str:
    inputs = ", ".join(f"{binding(n).key}: {fact(n)}" for n in entry.placeholders("input"))
    results = ", ".join(f"{o.name}: {fact(n)}" for o, n in zip(entry.outputs, entry.results(), strict=True))
    lines = [f"entry {name}({inputs}) -> ({results}) {{"]
    lines += [f"  {line(node)}" for node in entry.calls()]
    returned = ", ".join(_operand(n) for n in entry.results())
    return "\n".join([*lines, f"  return {returned}", "}"])


def line(node: fx.Node) -> str:
    """`%name: f32[2, 8] = op(%a, weight.key, 3)  # module.path`."""
    arguments = [_operand(a) for a in node.args] + [f"{k}={_operand(v)}" for k, v in node.kwargs.items()]
    text = f"%{node.name}: {fact(node)} = {op_name(node.target)}({', '.join(arguments)})"
    origin = module_path(node)
    return f"{text}  # {origin}" if origin else text


def fact(node: fx.Node) -> str:
    return _fact(node.meta.get("val"))


def _fact(val: Any) -> str:
    if isinstance(val, Tensor):
        return f"{SHORT.get(val.dtype, str(val.dtype))}[{', '.join(str(n) for n in val.shape)}]"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(_fact(v) for v in val)})"
    return str(val)


def op_name(target: Any) -> str:
    """`linear` for aten.linear.default, `add.Scalar` for other overloads, the plain name for Python functions."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).split(".", 1)[1]
        return name.removesuffix(".default").removesuffix(".Tensor")
    return str(getattr(target, "__name__", target))


def _operand(argument: Any) -> str:
    if is_weight(argument):
        return binding(argument).key
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_operand(a) for a in argument)}]"
    return str(argument)


def diff(before: Program, after: Program) -> str:
    """Unified diff of the two renderings; empty when they are the same."""
    return "\n".join(
        difflib.unified_diff(
            render(before).splitlines(), render(after).splitlines(), "before", "after", lineterm="", n=1
        )
    )
