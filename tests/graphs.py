"""Programs built op by op, for graphs that no exporter writes and that must take no time to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sylvester.compiler import ops  # noqa: F401  (registers the dialect)
from sylvester.compiler.program import Binding, Entry, Output, Program, StateSlot, fake_like
from sylvester.compiler.weights import ParameterStore

aten, dialect = torch.ops.aten, torch.ops.sylvester
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
LAYER_NORM, RMS_NORM = aten.layer_norm.default, dialect.rms_norm.default
ADD, MUL, GELU = aten.add.Tensor, aten.mul.Tensor, aten.gelu.default
RESHAPE, PERMUTE = aten.reshape.default, aten.permute.default


class Builder:
    """One entry over static shapes. Inputs and weights get normal values; biases and gains are small and near one."""

    def __init__(self, name: str = "forward", program: Program | None = None) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.graph = fx.Graph()
        self.end = self.graph.output(())
        self.entry = Entry(self.graph, [], {})
        self.program = program or Program(ParameterStore(), {})
        self.program.entries[name] = self.entry

    def input(self, *shape: int) -> fx.Node:
        return self.given(torch.randn(shape, generator=self.random))

    def ids(self, *shape: int, high: int) -> fx.Node:
        return self.given(torch.randint(high, shape, generator=self.random))

    def given(self, tensor: Tensor) -> fx.Node:
        key = f"x{len(self.entry.examples)}"
        self.entry.examples[key] = tensor
        return self._place("input", key, tensor)

    def weight(self, key: str, *shape: int) -> fx.Node:
        if key not in self.program.weights:
            self.program.weights[key] = torch.randn(shape, generator=self.random) / (shape[-1] if shape else 1) ** 0.5
        return self._place("weight", key, self.program.weights[key])

    def gain(self, key: str, size: int) -> fx.Node:
        if key not in self.program.weights:
            self.program.weights[key] = 1 + torch.randn(size, generator=self.random) / 3
        return self._place("weight", key, self.program.weights[key])

    def state(self, key: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        slots = self.program.state
        slots.setdefault(key, StateSlot(len(slots), shape, dtype))
        return self._place("state", key, torch.zeros(shape, dtype=dtype))

    def _place(self, kind: Any, key: str, tensor: Tensor) -> fx.Node:
        if all(node.meta.get("bind") != Binding(kind, key) for node in self.graph.find_nodes(op="placeholder")):
            self.entry.bind(kind, key, fake_like(self.mode, tensor))
        return next(n for n in self.entry.placeholders(kind) if n.meta["bind"].key == key)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.entry.emit(target, *args, before=self.end, **kwargs)

    def linear(self, x: fx.Node, key: str, out: int, bias: bool = False) -> fx.Node:
        weight = self.weight(f"{key}.weight", out, x.meta["val"].shape[-1])
        return self.call(LINEAR, x, weight, *([self.weight(f"{key}.bias", out)] if bias else []))

    def rms(self, x: fx.Node, key: str = "", eps: float = 1e-6) -> fx.Node:
        return self.call(RMS_NORM, x, self.gain(key, x.meta["val"].shape[-1]) if key else None, eps)

    def layer_norm(self, x: fx.Node, key: str, bias: bool = True, eps: float = 1e-5) -> fx.Node:
        size = x.meta["val"].shape[-1]
        shift = self.weight(f"{key}.bias", size) if bias else None
        return self.call(LAYER_NORM, x, [size], self.gain(f"{key}.weight", size), shift, eps)

    def attention(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None = None) -> fx.Node:
        return self.call(dialect.attention.default, q, k, v, mask, None, 0.3, False, 0)

    def heads(self, x: fx.Node, count: int) -> fx.Node:
        """[batch, tokens, count d] -> [batch, count, tokens, d]."""
        batch, tokens, width = x.meta["val"].shape
        return self.call(PERMUTE, self.call(RESHAPE, x, [batch, tokens, count, width // count]), [0, 2, 1, 3])

    def joined(self, x: fx.Node) -> fx.Node:
        batch, count, tokens, width = x.meta["val"].shape
        return self.call(RESHAPE, self.call(PERMUTE, x, [0, 2, 1, 3]), [batch, tokens, count * width])

    def returns(self, *results: fx.Node, **state: fx.Node) -> Program:
        """The program; keywords are the next values of slots, with "__" for "."."""
        names = [key.replace("__", ".") for key in state]
        self.end.args = ((*results, *state.values()),)
        self.entry.outputs[:] = [Output("output", f"y{i}") for i in range(len(results))]
        self.entry.outputs += [Output("state", name) for name in names]
        self.program.sweep()
        return self.program


def block(b: Builder, x: fx.Node, name: str, norm: Callable[[fx.Node, str], fx.Node], heads: int = 3) -> fx.Node:
    """A pre-norm block: attention with as many heads, then a GELU feed-forward part twice as wide plus four."""
    width = x.meta["val"].shape[-1]
    n = norm(x, f"{name}.norm1")
    q, k, v = (b.heads(b.linear(n, f"{name}.{part}", width, bias=True), heads) for part in "qkv")
    x = b.call(ADD, x, b.linear(b.joined(b.attention(q, k, v)), f"{name}.o", width, bias=True))
    up = b.call(GELU, b.linear(norm(x, f"{name}.norm2"), f"{name}.up", 2 * width + 4, bias=True))
    return b.call(ADD, x, b.linear(up, f"{name}.down", width, bias=True))


def decoder(norm: str = "rms", width: int = 24, blocks: int = 2, tied: bool = False, vocabulary: int = 31) -> Program:
    """A language model of two sequences of 5 tokens; `norm` is rms or layer_norm."""
    b = Builder()
    kind = b.rms if norm == "rms" else b.layer_norm
    x = b.call(EMBEDDING, b.weight("table", vocabulary, width), b.ids(2, 5, high=vocabulary))
    for number in range(blocks):
        x = block(b, x, f"block{number}", kind)
    x = kind(x, "final")
    return b.returns(b.call(LINEAR, x, b.weight("table" if tied else "head", vocabulary, width)))
