"""What ops accept, as recorded calls: the ATen cases, the examples of the dialect, and the left sides of rules.

A record says how its operands' sizes hang together: equal sizes are tied until running the call shows otherwise.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import sylvester.passes
from sylvester.codegen import compile as _registered  # noqa: F401  (registers the lowerings)
from sylvester.codegen.lowering import LOWERINGS
from sylvester.compiler.ops import OPS, Example, Ints, Records, Stored
from sylvester.compiler.pattern import trace
from sylvester.compiler.rewrite import Rule
from tests.aten_cases import CASES
from tests.fuzz.graphs import Ref, Step, mapped
from tests.sampling import Case, Sample, sample
from tests.spellings import spellings

dialect = torch.ops.sylvester


@dataclass(frozen=True)
class Record:
    """Calls over samples; `Ref(k)` is sample k, or after the samples the result of an earlier call."""

    name: str
    samples: tuple[Sample, ...]
    calls: tuple[Step, ...]

    @property
    def pointwise(self) -> bool:
        return all(torch.Tag.pointwise in getattr(call.target, "tags", ()) for call in self.calls)


def record(case: Case) -> Record:
    samples = case.samples
    rest = iter(range(len(samples)))
    args, kwargs = mapped((case.args, case.kwargs), lambda x: Ref(next(rest)) if isinstance(x, Sample) else x)
    return Record(str(case.target), tuple(samples), (Step(case.target, args, kwargs),))


def motif(name: str, graph: fx.Graph, samples: list[Sample]) -> Record:
    """The calls of a traced function."""
    numbers, calls = {node: k for k, node in enumerate(graph.find_nodes(op="placeholder"))}, []
    for node in (n for n in graph.nodes if n.op == "call_function"):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: Ref(numbers[n]))
        calls.append(Step(node.target, tuple(_plain(args)), dict(kwargs)))
        numbers[node] = len(numbers)
    return Record(name, tuple(samples), tuple(calls))


def _plain(tree: Any) -> Any:
    """Tuples and lists in place of the immutable ones of a graph."""
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(_plain(x) for x in tree)
    return tree


def _rules() -> Iterator[Record]:
    for module in pkgutil.iter_modules(sylvester.passes.__path__):
        importlib.import_module(f"sylvester.passes.{module.name}")
    for rule in sorted(Rule.__subclasses__(), key=lambda rule: (rule.__module__, rule.__qualname__)):
        if rule.__module__.startswith("sylvester.passes"):
            yield from _forms(rule)


def _forms(rule: type[Rule]) -> Iterator[Record]:
    samples = [s for s in map(sample, rule.example) if isinstance(s, Sample)]
    for graph in spellings(rule):
        yield motif(f"rule {rule.__name__}", graph, samples)


def feed_forward(x: Tensor, g: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(dialect.rms_norm(x, g, 1e-5), up)), down)


def gated(x: Tensor, g: Tensor, b: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    n = F.layer_norm(x, (32,), g, b)
    return x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)


def scores(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b, c = (F.linear(x, w).unflatten(-1, (2, 16)).transpose(1, 2) for w in (q, k, v))
    return F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2).flatten(2)


def plain_norm(x: Tensor, g: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g


WIDE, SQUARE = Sample((48, 32), weight=True), Sample((32, 32), weight=True)
ROWS, GAIN, DOWN = Sample((2, 3, 32)), Sample((32,), weight=True), Sample((32, 48), weight=True)
MOTIFS = (
    (feed_forward, (ROWS, GAIN, WIDE, DOWN)),
    (gated, (ROWS, GAIN, GAIN, WIDE, WIDE, DOWN)),
    (scores, (ROWS, SQUARE, SQUARE, SQUARE)),
    (plain_norm, (ROWS, GAIN)),
)
"""Parts of transformers, which calls drawn one by one hardly ever make."""


def _stored_motif(name: str, samples: Iterable[Any], *calls: tuple[Any, ...]) -> Record:
    """Calls over examples as ops declare them, for what tracing shapes alone cannot make."""
    made = tuple(s for s in map(sample, samples) if isinstance(s, Sample))
    return Record(f"motif {name}", made, tuple(Step(target, tuple(args), {}) for target, *args in calls))


def _caches(bits: int) -> Record:
    """Queries, two caches of records, their new rows, and how many rows they hold."""
    shape, new, past = (2, 2, 16, 8), (2, 2, 3, 8), Ref(5)
    samples = ((2, 4, 3, 8), Records(shape, bits), Records(shape, bits), new, new, Ints((), 13))
    write, read = dialect.kv_update_q.default, dialect.attention_q.default
    return _stored_motif(
        f"cache of {bits} bits",
        samples,
        (write, Ref(1), Ref(3), past, bits),
        (write, Ref(2), Ref(4), past, bits),
        (read, Ref(0), Ref(6), Ref(7), None, past, 0.35, True, 0, 0.0, bits),
    )


def _widened() -> Record:
    """A layer whose weight of 4 bits is made float."""
    samples = ((2, 3, 32), Stored((37, 16), torch.uint8), Stored((37, 1)))
    widen = (dialect.dequantize_w4.default, Ref(1), Ref(2))
    return _stored_motif("widened", samples, widen, (torch.ops.aten.linear.default, Ref(0), Ref(3)))


def _motifs() -> Iterator[Record]:
    yield from (_caches(8), _caches(4), _widened())
    for function, samples in MOTIFS:
        example: Example = tuple(s.shape for s in samples)
        yield motif(f"motif {function.__name__}", trace(function, example), list(samples))


@cache
def records() -> dict[str, tuple[Record, ...]]:
    """All records by what they call, in an order that no import decides.

    A name is drawn first, so that ops with many records weigh no more.
    """
    found: dict[str, list[Record]] = {}
    examples = (
        Case(op.target, tuple(map(sample, e))) for op in OPS.values() if op.target in LOWERINGS for e in op.examples
    )
    for made in itertools.chain(map(record, (*CASES, *examples)), _rules(), _motifs()):
        found.setdefault(made.name, []).append(made)
    return {name: tuple(found[name]) for name in sorted(found)}


def lowered() -> set[Any]:
    """Every op that native code is made of."""
    return set(LOWERINGS)
