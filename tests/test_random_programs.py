"""Linear layers in odd company: biases that broadcast, vectors as weights, great depths, and random programs."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sylvester as sv
from sylvester.codegen.quantized import LARGEST_DEPTH
from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import Program
from sylvester.passes.quantize import Quantize
from tests.programs import program

rms_norm, swiglu = torch.ops.sylvester.rms_norm, torch.ops.sylvester.swiglu
WIDTHS = (32, 33, 64, 65, 7, 1)
WHOLE = (32, 64, 104)
SIZES = ((1, 1), (1, 4), (2, 3), (1, 5), (3, 37))


def on_cpu(traced: Program, *inputs: tuple[Tensor, ...], threads: int = 2) -> list[list[Tensor]]:
    with sv.compile(traced, target=sv.Target("cpu", threads=threads, isas=("avx2",))) as compiled:
        results = [compiled(*given) for given in inputs]
    return [[r] if isinstance(r, Tensor) else list(r) for r in results]


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def test_biases_and_norm_weights_that_broadcast() -> None:
    def model(x: Tensor, w: Tensor, v: Tensor, one: Tensor, row: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        joined = F.linear(x, w, one), F.linear(x, v)
        alone = F.linear(x + 1, w, row), F.linear(x + 2, v[0])
        return *joined, *alone, F.linear(rms_norm(x, g, 1e-5), w), F.linear(rms_norm(x, h, 1e-5), w)

    shapes = {"w": (33, 40), "v": (5, 40), "one": (1,), "row": (1, 33), "g": (1,), "h": (7, 40)}
    made, x = {key: torch.randn(shape) for key, shape in shapes.items()}, torch.randn(7, 40)
    traced = program(model, x, weights=made, axes=lambda _: ())

    (found,) = on_cpu(traced, (x,))
    expected = model(x.double(), *(made[key].double() for key in shapes))
    assert max(map(relative, found, expected)) <= 2e-6


def test_weights_and_inputs_that_are_outputs() -> None:
    made, x = {"w": torch.randn(40, 33), "v": torch.randn(5)}, torch.randn(7, 33)
    traced = program(lambda x, w, v: (F.linear(x, w), w, v, x), x, weights=made, axes=lambda _: ())

    ((product, w, v, same),) = on_cpu(traced, (x,))
    assert relative(product, F.linear(x.double(), made["w"].double())) <= 2e-6
    assert all(torch.equal(a, b) for a, b in ((w, made["w"]), (v, made["v"]), (same, x)))


def test_streams_that_lie_in_buffers_of_another_shape() -> None:
    """A 1d convolution leaves its result in memory as a picture of one row."""

    def model(x: Tensor, before: Tensor, w: Tensor) -> Tensor:
        return torch.ops.sylvester.layers_to_skip(before, F.conv1d(x, w), None, 0.1, 2.0)

    x, before, w = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(4, 3, 3)
    traced = program(model, x, before, weights={"w": w}, axes=lambda _: ())

    (((found,)),) = on_cpu(traced, (x, before))
    assert torch.equal(found, model(x, before, w))


def test_sums_of_int8_products_that_may_not_fit_are_refused() -> None:
    depth = 2 * LARGEST_DEPTH
    stored = {"w": torch.ones(1, depth, dtype=torch.int8), "scales": torch.ones(1, 1)}
    traced = program(lambda x, w, s: dialect.linear_w8(x, w, s), torch.ones(2, depth), weights=stored)

    with pytest.raises(Unsupported, match=f"depths up to {LARGEST_DEPTH}, found {depth}"):
        on_cpu(traced)


def test_other_readers_of_an_int8_weight_are_refused() -> None:
    stored = {"w": torch.ones(5, 64, dtype=torch.int8), "scales": torch.ones(5, 1)}
    traced = program(lambda x, w, s: dialect.linear_w8(x, w, s) + w.float().sum(), torch.ones(2, 64), weights=stored)

    with pytest.raises(Unsupported, match=r"low-bit weight, found %.* over %"):
        on_cpu(traced)


class Drawn:
    """Steps over x [b, t, widths[0]] and their weights; each step takes one of the last three results."""

    def __init__(self, seed: int, widths: tuple[int, ...], count: int = 14) -> None:
        self.numbers, choose = torch.Generator().manual_seed(seed), random.Random(seed)
        self.made: dict[str, Tensor] = {}
        self.steps: list[tuple[str, int, int, str, str]] = []
        self.width = [widths[0]]
        for _ in range(count):
            i = choose.randrange(max(0, len(self.width) - 3), len(self.width))
            kind = choose.choice(["linear", "linear", "rms", "layer", "gate", "add", "column", "part"])
            self.draw(kind, i, choose.choice(widths), choose)

    def draw(self, kind: str, i: int, n: int, choose: random.Random) -> None:
        own = self.width[i]
        if kind in ("linear", "gate"):
            for _ in range(1 + (kind == "gate")):
                self.add("linear", i, i, n, self.weight(n, own), self.weight(n) if choose.random() < 0.5 else "")
        if kind == "gate":
            self.add(kind, len(self.width) - 2, len(self.width) - 1, n)
        elif kind == "part" and n <= own:
            self.add(kind, i, n, n)
        elif kind in ("rms", "layer", "add", "column"):
            same = choose.choice([j for j, other in enumerate(self.width) if other == own])
            self.add(kind, i, same, own, self.weight(own))

    def weight(self, *shape: int) -> str:
        name = f"p{len(self.made)}"
        self.made[name] = torch.randn(shape, generator=self.numbers) / shape[-1] ** 0.5
        return name

    def add(self, kind: str, i: int, j: int, n: int, weight: str = "", bias: str = "") -> None:
        self.steps.append((kind, i, j, weight, bias))
        self.width.append(n)

    def __call__(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given, results = dict(zip(self.made, weights, strict=True)), [x]
        for kind, i, j, weight, bias in self.steps:
            results.append(_step(kind, results, i, j, given.get(weight), given.get(bias)))
        return tuple(results[-3:])


def _step(kind: str, results: list[Tensor], i: int, j: int, w: Tensor | None, b: Tensor | None) -> Tensor:
    x = results[i]
    return {
        "linear": lambda: F.linear(x, w, b),
        "rms": lambda: rms_norm(x, w, 1e-5),
        "layer": lambda: F.layer_norm(x, w.shape, w, None, 1e-5),
        "gate": lambda: swiglu(x, results[j]),
        "add": lambda: x + results[j],
        "column": lambda: F.gelu(x) * w,
        "part": lambda: x[..., :j],
    }[kind]()


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_in_float32(seed: int) -> None:
    model = Drawn(seed, WIDTHS)
    inputs = [(torch.randn(*size, WIDTHS[0]),) for size in SIZES]
    traced = program(model, torch.randn(2, 3, WIDTHS[0]), weights=model.made)

    for (x,), found in zip(inputs, on_cpu(traced, *inputs, threads=2 + seed), strict=True):
        expected = model(x.double(), *(w.double() for w in model.made.values()))
        assert max(map(relative, found, expected)) <= 1e-5


@pytest.mark.parametrize(
    ("weights", "group", "rows", "allowed"),
    [(8, 0, 8, 5e-2), (8, 32, 16, 1e-3), (4, 32, 8, 5e-2), (4, 64, 16, 1e-3), (3, 32, 16, 1e-3), (16, 0, None, 5e-2)],
)
def test_random_programs_with_low_bit_weights(weights: int, group: int, rows: int | None, allowed: float) -> None:
    """Sums in another order may round a number the other way and move what follows; a wrong kernel moves it more."""
    model = Drawn(11 + group, WHOLE)
    inputs = [(torch.randn(*size, WHOLE[0]),) for size in SIZES]
    traced = program(model, torch.randn(2, 3, WHOLE[0]), weights=model.made)
    Quantize(weights=weights, activations=rows, group=group).run(traced)  # type: ignore[arg-type]
    traced.sweep()

    with sv.compile(traced, target="reference") as reference:
        wanted = [reference(*given) for given in inputs]
    for found, expected in zip(on_cpu(traced, *inputs, threads=3), wanted, strict=True):
        assert max(map(relative, found, [e.double() for e in expected])) <= allowed
