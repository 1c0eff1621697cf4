"""What a translation writes with: operands with their facts, casts, symbolic sizes and stored weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import onnx_ir as ir
import sympy
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.graph import CONTRIB, TYPES, Graph
from sylvester.backends.onnx.options import Options
from sylvester.backends.onnx.weights import PLAIN, Form, Store
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

Size = int | torch.SymInt


@dataclass(frozen=True)
class Operand:
    """A tensor that a translation reads: what the program knows of it, and its value in the ONNX graph.

    Weights, and what only widens them, become a value when that is asked for: layers have forms of their own.
    """

    builder: Builder
    fact: Tensor
    node: fx.Node

    @property
    def value(self) -> ir.Value:
        return cast(ir.Value, self.builder.value_of(self.node))

    @property
    def is_weight(self) -> bool:
        return is_weight(self.node)

    @property
    def key(self) -> str:
        """Of a weight."""
        return binding(self.node).key

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(self.fact.shape)

    @property
    def rank(self) -> int:
        return self.fact.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.fact.dtype

    def width(self, axis: int = -1) -> int:
        """A size that is a number; `Unsupported` where it is symbolic."""
        size: Any = self.fact.shape[axis]
        if isinstance(size, torch.SymInt):
            raise Unsupported(f"axis {axis} of {self.node.name} is symbolic, its ONNX form needs a number")
        return int(size)


Translation = Callable[..., ir.Value | Sequence[ir.Value]]
TRANSLATIONS: dict[Any, Translation] = {}


Given = TypeVar("Given", bound=Callable[..., Any])


def translates(*targets: Any) -> Callable[[Given], Given]:
    """Register `function(builder, fact of the result, *arguments)` for these ops; operands come as `Operand`."""

    def register(function: Given) -> Given:
        TRANSLATIONS.update(dict.fromkeys(targets, function))
        return function

    return register


class Builder(Graph):
    """The graph of one entry."""

    def __init__(self, name: str, program: Program, entry: Entry, options: Options, store: Store) -> None:
        super().__init__(options.opset)
        self.name, self.program, self.entry, self.options, self.store = name, program, entry, options, store
        self.inputs: dict[fx.Node, ir.Value] = {}
        self.values: dict[fx.Node, Any] = {}
        """What every node that has been written has become."""
        self.later: dict[fx.Node, Callable[[], Any]] = {}
        """Nodes that are written when they are read."""
        self.weights: dict[str, ir.Value] = {}
        self.reading: fx.Node | None = None
        """The node that is being written."""
        self.tables: dict[tuple[fx.Node, fx.Node], tuple[str, str] | None] = {}
        """Cosines and sines -> the names of their stored tables, None where they are none."""
        self.exact_rows = False
        """Whether a layer with weights of whole numbers reads rows of more than 8 bits."""
        self.row_by_row = False
        """Whether several tokens that meet a cache have to come one row at a time."""

    @property
    def contrib(self) -> bool:
        return self.options.ops == "ort"

    def require_opset(self, opset: int, what: str) -> None:
        if self.opset < opset:
            hint = f'Target("onnx", options={{"opset": {opset}}}), or leave it out'
            raise Unsupported(f"{what} needs opset {opset} or above, found opset {self.opset}", hint=hint)

    def extra(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The only result of an op of onnxruntime."""
        return self.call(op, *inputs, domain=CONTRIB, **attributes)

    def cast(self, x: ir.Value, source: torch.dtype, dtype: torch.dtype) -> ir.Value:
        return x if source == dtype else self.call("Cast", x, to=TYPES[dtype])

    def operand(self, node: fx.Node) -> Operand:
        return Operand(self, value(node), node)

    def value_of(self, node: fx.Node) -> Any:
        if node in self.later and node not in self.values:
            self.values[node] = self.later[node]()
        return self.weight(binding(node).key, PLAIN) if is_weight(node) else self.values[node]

    def read(self, x: Any, dtype: torch.dtype) -> ir.Value:
        """An operand, number or size in a dtype."""
        if isinstance(x, Operand):
            return self.cast(x.value, x.dtype, dtype)
        if isinstance(x, torch.SymInt):
            return self.cast(self.call("Squeeze", self.size(x), self.ints(0)), torch.int64, dtype)
        return self.number(x, dtype)

    def weight(self, key: str, form: Form) -> ir.Value:
        """A stored tensor, made from the weight `key`; one of a name stands in the file once, for all graphs."""
        return self.stored(self.store.add(key, form))

    def stored(self, name: str) -> ir.Value:
        if name not in self.weights:
            self.weights[name] = self.store.value(name)
        return self.weights[name]

    def joined(self, name: str, make: Callable[[], Tensor]) -> ir.Value:
        """A stored tensor that is made of several weights."""
        return self.stored(self.store.made(name, make))

    def size(self, size: Size) -> ir.Value:
        """int64 [1]."""
        if isinstance(size, torch.SymInt):
            return self._expression(size.node.expr)
        return self.ints(int(size))

    def shape(self, sizes: Sequence[Size]) -> ir.Value:
        """int64 [rank]."""
        if all(is_number(n) for n in sizes):
            return self.ints(*(int(n) for n in sizes))
        return self.call("Concat", *(self.size(n) for n in sizes), axis=0)

    def reshape(self, x: ir.Value, shape: Sequence[Size], source: Sequence[Size] = ()) -> ir.Value:
        """x in another shape; sizes are copied from `source`, the shape of x, and one is left open, where that does."""
        same = [d < len(source) and not is_number(n) and equal(n, source[d]) for d, n in enumerate(shape)]
        sizes = [0 if same[d] else n for d, n in enumerate(shape)]
        open_axes = [d for d, n in enumerate(sizes) if not is_number(n)]
        if len(open_axes) == 1 and all(n != 0 or same[d] for d, n in enumerate(sizes)):
            sizes[open_axes[0]] = -1
        if all(is_number(n) for n in sizes):
            copies = any(same)
            return self.call("Reshape", x, self.ints(*(int(n) for n in sizes)), allowzero=None if copies else 1)
        return self.call("Reshape", x, self.shape(shape), allowzero=1)

    def _expression(self, expression: Any) -> ir.Value:
        if expression.is_Integer:
            return self.ints(int(expression))
        if isinstance(expression, sympy.Symbol):
            return self._symbol(expression)
        name = type(expression).__name__
        if name not in ARITHMETIC:
            raise Unsupported(f"the size {expression} has no ONNX form")
        first, *rest = (self._expression(part) for part in expression.args)
        for other in rest:
            first = self.call(ARITHMETIC[name], first, other)
        return first

    def _symbol(self, symbol: sympy.Symbol) -> ir.Value:
        for node in (*self.entry.placeholders("input"), *self.entry.placeholders("state")):
            for axis, n in enumerate(value(node).shape):
                if isinstance(n, torch.SymInt) and n.node.expr == symbol:
                    return self.call("Shape", self.inputs[node], start=axis, end=axis + 1)
        for node in self.entry.placeholders("input"):
            for axis, n in enumerate(value(node).shape):
                if isinstance(n, torch.SymInt) and symbol in n.node.expr.free_symbols:
                    return self._solved(symbol, n.node.expr, self.inputs[node], axis)
        names = [binding(n).key for n in self.entry.placeholders("input")]
        raise Unsupported(f"the size {symbol} is no size of an input, which are {names}")

    def _solved(self, symbol: sympy.Symbol, expression: Any, given: ir.Value, axis: int) -> ir.Value:
        """The symbol of a size that is linear in it."""
        slope, start = sympy.Poly(expression, symbol).all_coeffs()
        size = self.call("Shape", given, start=axis, end=axis + 1)
        return self.call("Div", self.call("Sub", size, self.ints(int(start))), self.ints(int(slope)))


ARITHMETIC = {"Add": "Add", "Mul": "Mul", "FloorDiv": "Div", "Max": "Max", "Min": "Min", "Mod": "Mod"}
"""Of sizes, which are not negative; `PythonMod` and `CeilDiv` are spelled with these."""
ARITHMETIC |= {"PythonMod": "Mod"}


def is_number(size: Size) -> bool:
    return not isinstance(size, torch.SymInt)


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are written alike."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return is_number(a) and is_number(b) and a == b
