"""Random graphs of ops that keep, mix, move and break bases: no rotation may change what they compute."""

from __future__ import annotations

import random

import pytest
from torch import fx

from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.fold_norms import FoldNorms
from sylvester.passes.rotate_hadamard import RotateHadamard
from tests.graphs import ADD, EMBEDDING, GELU, LINEAR, MUL, PERMUTE, RESHAPE, Builder, aten, block, dialect

WIDTHS = (8, 12, 24)
TOKENS = 6
FLAGS = ("residual", "values", "ffn", "keys", "heads", "online")


class Random:
    """Grows a graph over values [2, tokens, width]; weights, gains and biases are reused wherever they fit."""

    def __init__(self, seed: int) -> None:
        self.r, self.b = random.Random(seed), Builder()
        self.values = [self.b.input(2, TOKENS, self.r.choice(WIDTHS)) for _ in range(self.r.randint(0, 1))]
        self.embed(self.pick(WIDTHS))
        self.embed(self.pick(WIDTHS))

    def pick(self, options: object) -> object:
        return self.r.choice(list(options))

    def width(self, x: fx.Node) -> int:
        return int(x.meta["val"].shape[-1])

    def any(self, width: int = 0) -> fx.Node:
        recent = self.values[-4:] if self.r.random() < 0.7 else self.values
        fitting = [x for x in recent if width in (0, self.width(x))]
        return self.pick(fitting or [x for x in self.values if width in (0, self.width(x))] or [self.embed(width)])

    def weight(self, *shape: int) -> fx.Node:
        """A new weight, or one of two of its shape that embeddings, layers and sums share."""
        number = self.r.randint(0, 1) if self.r.random() < 0.4 else len(self.b.program.weights)
        return self.b.weight(f"w{'x'.join(map(str, shape))}.{number}", *shape)

    def add(self, x: fx.Node) -> fx.Node:
        self.values.append(x)
        return x

    def embed(self, width: int) -> fx.Node:
        table = self.weight(self.pick((16, width, 24)), width)
        return self.add(self.b.call(EMBEDDING, table, self.b.ids(2, TOKENS, high=int(table.meta["val"].shape[0]))))

    def linear(self, x: fx.Node, width: int) -> fx.Node:
        bias = [self.weight(width)] if self.r.random() < 0.5 else []
        return self.add(self.b.call(LINEAR, x, self.weight(width, self.width(x)), *bias))

    def step(self) -> None:
        name = self.pick([n for n in dir(self) if n.startswith("do_")])
        getattr(self, name)(self.any())

    def do_linear(self, x: fx.Node) -> None:
        self.linear(x, self.pick(WIDTHS))

    def do_feed_forward(self, x: fx.Node) -> None:
        up = self.b.call(GELU, self.linear(self.normed(x), self.pick(WIDTHS)))
        self.add(self.b.call(ADD, x, self.linear(up, self.width(x))))

    def do_residual(self, x: fx.Node) -> None:
        self.add(self.b.call(ADD, x, self.linear(self.any(), self.width(x))))

    def do_sum(self, x: fx.Node) -> None:
        kinds = {"alpha": self.r.choice((1, 0.5))}
        self.add(self.b.call(self.pick((ADD, aten.sub.Tensor)), x, self.any(self.width(x)), **kinds))

    def do_scalar(self, x: fx.Node) -> None:
        op, number = self.pick(((ADD, 0.5), (MUL, -1.5), (aten.div.Tensor, 3.0)))
        self.add(self.b.call(op, x, number))

    def do_vector(self, x: fx.Node) -> None:
        shape = self.pick(((self.width(x),), (1,), (TOKENS, self.width(x)), (TOKENS, 1), (1, 1, self.width(x))))
        self.add(self.b.call(self.pick((ADD, MUL)), x, self.weight(*shape)))

    def do_viewed_weight(self, x: fx.Node) -> None:
        rows = self.b.call(aten.slice.Tensor, self.weight(9, self.width(x)), 0, 0, TOKENS)
        self.add(self.b.call(ADD, x, self.b.call(aten.unsqueeze.default, rows, 0)))

    def do_weight_elsewhere(self, x: fx.Node) -> None:
        largest = self.b.call(aten.amax.default, self.weight(self.pick(WIDTHS), self.width(x)), [0, 1], True)
        self.add(self.b.call(MUL, x, largest))

    def do_row_factor(self, x: fx.Node) -> None:
        factor = self.b.call(aten.amax.default, self.any(), [-1], True)
        self.add(self.b.call(MUL, *self.pick(((x, factor), (factor, x)))))

    def do_pointwise(self, x: fx.Node) -> None:
        self.add(self.b.call(self.pick((GELU, aten.neg.default, aten.tanh.default, aten.clone.default)), x))

    def normed(self, x: fx.Node) -> fx.Node:
        kind, key = self.pick(("rms", "plain", "layer", "unbiased", "bare")), f"n{self.width(x)}.{self.r.randint(0, 2)}"
        if kind in ("rms", "plain"):
            return self.add(self.b.rms(x, key * (kind == "rms")))
        if kind == "bare":
            return self.add(self.b.call(aten.layer_norm.default, x, [self.width(x)]))
        return self.add(self.b.layer_norm(x, key, kind == "layer"))

    def do_norm(self, x: fx.Node) -> None:
        self.normed(x)

    def do_norm_then_views(self, x: fx.Node) -> None:
        n = self.normed(x)
        n = self.pick((lambda: n, lambda: self.b.call(MUL, n, 2.0), lambda: self.tokens_moved(n)))()
        self.linear(n, self.pick(WIDTHS))

    def tokens_moved(self, x: fx.Node) -> fx.Node:
        mean = self.b.call(self.pick((aten.mean.dim, aten.sum.dim_IntList)), x, [1], True)
        first = self.b.call(aten.unsqueeze.default, self.b.call(aten.select.int, x, 1, 0), 1)
        joined = self.b.call(aten.cat.default, [mean, first, x], 1)
        return self.b.call(aten.slice.Tensor, joined, 1, 0, TOKENS)

    def do_tokens(self, x: fx.Node) -> None:
        self.add(self.tokens_moved(x))

    def do_feature_slices(self, x: fx.Node) -> None:
        half = self.width(x) // 2
        a, b = (self.b.call(aten.slice.Tensor, x, 2, k * half, (k + 1) * half) for k in (0, 1))
        self.add(self.b.call(aten.cat.default, [b, a], 2))

    def do_reshape(self, x: fx.Node) -> None:
        width = self.width(x)
        way = self.pick(([2 * TOKENS, width], [2, TOKENS, width // 4, 4], [2, TOKENS * width], [2, TOKENS * 2, -1]))
        apart = self.b.call(RESHAPE, x, way)
        apart = self.b.rms(apart) if self.r.random() < 0.5 else self.b.call(MUL, apart, 0.5)
        self.add(self.b.call(RESHAPE, apart, [2, TOKENS, width]))

    def do_attention(self, x: fx.Node) -> None:
        width, n = self.width(x), self.normed(x)
        parts = [self.b.heads(self.linear(n, width), 2) for _ in range(3)]
        if self.r.random() < 0.3:
            parts = [parts[0], parts[1], parts[1]]
        if self.r.random() < 0.2:
            parts = [self.b.call(GELU, p) for p in parts]
        mask = self.b.call(aten.unsqueeze.default, self.linear(self.any(), 12), 1) if self.r.random() < 0.3 else None
        mask = mask and self.b.call(aten.slice.Tensor, mask, 3, 0, TOKENS)
        self.add(self.b.call(ADD, x, self.linear(self.b.joined(self.b.attention(*parts, mask)), width)))

    def do_bare_attention(self, x: fx.Node) -> None:
        q, k, v = (self.b.heads(self.any(self.width(x)), 1) for _ in range(3))
        self.add(self.b.joined(self.b.attention(q, k, v)))

    def do_convolution(self, x: fx.Node) -> None:
        width, moved = self.width(x), self.b.call(PERMUTE, x, [0, 2, 1])
        groups = self.pick((1, width))
        weight = self.weight(width, width // groups, 3)
        y = self.b.call(aten.conv1d.default, moved, weight, self.weight(width), [1], [1], [1], groups)
        self.add(self.b.call(PERMUTE, y, [0, 2, 1]))

    def do_fused(self, x: fx.Node) -> None:
        """One weight for two parts, of which one is gated by the other."""
        both = self.b.call(LINEAR, self.normed(x), self.weight(24, self.width(x)), self.weight(24))
        a, b = (self.b.call(aten.slice.Tensor, both, 2, 12 * k, 12 * k + 12) for k in (0, 1))
        self.add(self.b.call(dialect.swiglu.default, a, b))

    def program(self, steps: int) -> Program:
        for _ in range(steps):
            self.step()
        last = [self.b.rms(x) for x in self.values[-3:]]
        return self.b.returns(*last, *self.r.sample(self.values, 1))


def options(r: random.Random) -> RotateHadamard:
    flags = {name: r.random() < 0.75 for name in FLAGS}
    return RotateHadamard(**flags, tied=r.choice(("auto", "online", "split")), seed=r.randint(0, 9))


@pytest.mark.parametrize("seed", range(100))
def test_random_graphs_stay_the_same(seed: int) -> None:
    grown = Random(seed)
    program = grown.program(steps=4 + seed % 14)

    chosen = options(grown.r)
    once, ledger = Pipeline((FoldNorms(chosen.tied), chosen, options(grown.r))).run(program)

    assert all(row.error < 2e-5 for row in ledger.rows)
    assert set(once.entries) == {"forward"}


def small_transformer(r: random.Random) -> Program:
    """A decoder of random width, heads, norms, order of its parts and ties."""
    b, heads = Builder(), r.choice((1, 2, 3, 4))
    width, vocabulary = heads * r.choice((2, 4, 6, 7, 12)), r.choice((17, 2500))
    norm = b.rms if r.random() < 0.5 else b.layer_norm
    x = b.call(EMBEDDING, b.weight("table", vocabulary, width), b.ids(2, 5, high=vocabulary))
    for number in range(r.randint(1, 3)):
        if r.random() < 0.5:
            x = block(b, x, f"{number}", norm, heads)
            continue
        n, bias = norm(x, f"{number}.norm"), r.random() < 0.5
        q, k, v = (b.heads(b.linear(n, f"{number}.{part}", width, bias), heads) for part in "qkv")
        up = b.call(GELU, b.linear(n, f"{number}.up", r.choice((9, 16, 20)), bias))
        parts = (
            b.linear(b.joined(b.attention(q, k, v)), f"{number}.o", width),
            b.linear(up, f"{number}.down", width, bias),
        )
        x = b.call(ADD, x, b.call(ADD, *parts))
    head = "table" if r.random() < 0.5 else "head"
    return b.returns(b.call(LINEAR, norm(x, "final"), b.weight(head, vocabulary, width)))


@pytest.mark.parametrize("seed", range(40))
def test_random_transformers_stay_the_same(seed: int) -> None:
    r = random.Random(seed)

    _, ledger = Pipeline((options(r),)).run(small_transformer(r))

    assert ledger.rows[0].error < 1e-5
