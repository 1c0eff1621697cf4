"""Thresholds from calibration data, and how many zeros they make there and on data that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.activations import matrix
from sylvester.compiler.calibration import Sample
from sylvester.compiler.changes import Changes
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.quality import FIT, HELD
from sylvester.compiler.sparse_ops import ACTIVATIONS, zero_small
from sylvester.compiler.walk import Walk
from sylvester.passes.sparse_edges import Edge, Site

MOST = 1 << 22
"""Values that a quantile is taken of: rows chosen evenly over all samples."""
STAGE = "thresholds"


def fitted(program: Program, edges: Sequence[Edge], sparsity: float, by_channel: bool) -> None:
    """Set the thresholds of every edge, by what the dense program computes on the data to fit to."""
    seen: dict[int, list[_Seen]] = {}
    data = program.calibration

    def look(edge: Edge, site: Site, walk: Walk) -> None:
        found = seen.setdefault(id(edge), [])
        found.append(_Seen.gate(site, walk, by_channel) if site.gated else _Seen.input(site, walk))
        if len(found) == len(edge.within(program.main)):
            edge.levels = _levels(found, sparsity)
            del seen[id(edge)]

    _visit(program, edges, data.fit if data else (), look, dense=True)


def measured(program: Program, edges: Sequence[Edge], changes: Changes) -> None:
    """Figures of each edge: zeros in percent, with all edges zeroed; the mean over edges is a note."""
    data = program.calibration
    for name, samples in ((FIT, data.fit), (HELD, data.held)) if data else ():
        found = _shares(program, edges, samples)
        for edge, share in found:
            changes.figure(edge.weights[-1], f"{edge.kind} zeros % on {name} data", 100 * share)
        for kind in dict.fromkeys(edge.kind for edge, _ in found):
            shares = [share for edge, share in found if edge.kind == kind]
            mean, spread = sum(shares) / len(shares), f"{min(shares):.1%} to {max(shares):.1%}"
            changes.note(f"{kind}: {mean:.1%} zeros on {name} data, {spread} by layer")


def _shares(program: Program, edges: Sequence[Edge], samples: Sequence[Sample]) -> list[tuple[Edge, float]]:
    """The part of zeros at each site."""
    found: list[tuple[Edge, float]] = []

    def look(edge: Edge, site: Site, walk: Walk) -> None:
        zeros = [_zeroed(edge, site, walk, i) == 0 for i in range(len(walk.samples))]
        found.append((edge, sum(int(z.sum()) for z in zeros) / max(1, sum(z.numel() for z in zeros))))

    _visit(program, edges, samples, look, dense=False)
    return found


Look = Callable[[Edge, Site, Walk], None]


def _visit(program: Program, edges: Sequence[Edge], samples: Sequence[Sample], look: Look, *, dense: bool) -> None:
    """`look` at every site of the main entry in order; what follows reads dense or zeroed values."""
    if not samples:
        return
    sites = {_stop(site): (edge, site) for edge in edges for site in edge.within(program.main)}
    stops = [node for node in program.main.graph.nodes if node in sites]
    walk = Walk(program, samples, stops)
    for number, stop in enumerate(stops):
        report(STAGE, number, len(stops))
        walk.reach(stop)
        edge, site = sites[stop]
        look(edge, site, walk)
        if walk.wanted(stop):
            for i in range(len(samples)):
                walk.put(stop, i, _computed(stop, walk, i) if dense else _result(edge, site, walk, i))
    report(STAGE, len(stops), len(stops))


def _stop(site: Site) -> fx.Node:
    return site.gated or site.reader


def _computed(stop: fx.Node, walk: Walk, sample: int, **changed: Tensor) -> Tensor:
    """What the node computes; `x` takes the place of its first argument."""
    args, kwargs = map_arg((stop.args, dict(stop.kwargs)), lambda node: walk.values(node)[sample])
    first = changed.get("x", args[0])
    with torch.no_grad():
        result: Tensor = stop.target(first, *args[1:], **kwargs)  # type: ignore[operator]
    return result


def _result(edge: Edge, site: Site, walk: Walk, sample: int) -> Tensor:
    zeroed = _zeroed(edge, site, walk, sample)
    if site.gated is None:
        return _computed(site.reader, walk, sample, x=zeroed)
    product: Tensor = zeroed * walk.values(site.up)[sample]
    return product


def _zeroed(edge: Edge, site: Site, walk: Walk, sample: int) -> Tensor:
    """The gate, or the input of the layer, with its small values at 0."""
    source: Any = (site.gated or site.reader).args[0]
    x = walk.values(source)[sample]
    x = ACTIVATIONS[site.activation](x) if site.gated else x
    return zero_small.reference(x, edge.levels)


@dataclass(frozen=True)
class _Seen:
    """Rows [rows, channels] of what is compared with thresholds; `squares` over `count` is the mean square of what each
    channel multiplies, or one number for all.
    """

    rows: Tensor
    squares: Tensor
    count: int

    @staticmethod
    def gate(site: Site, walk: Walk, by_channel: bool) -> _Seen:
        assert site.gated is not None
        gates, ups = walk.values(site.gated.args[0]), walk.values(site.up)  # type: ignore[arg-type]
        squares = torch.stack([matrix(u.double()).square().sum(0) for u in ups]).sum(0)
        opened = [ACTIVATIONS[site.activation](rows) for rows in _spread(gates)]
        count = sum(len(matrix(u)) for u in ups)
        return _Seen(torch.cat(opened), squares if by_channel else torch.full_like(squares, count), count)

    @staticmethod
    def input(site: Site, walk: Walk) -> _Seen:
        rows = torch.cat(_spread(walk.values(site.reader.args[0])))  # type: ignore[arg-type]
        return _Seen(rows, torch.ones(1, dtype=torch.float64), 1)


def _spread(values: Sequence[Tensor]) -> list[Tensor]:
    flat = [x.flatten(0, -2) for x in values]
    every = -(-sum(x.numel() for x in flat) // MOST)
    return [x[::every] for x in flat]


def _levels(seen: Sequence[_Seen], sparsity: float) -> Tensor:
    """t = sqrt(T / m) as float32, where the part `sparsity` of all a^2 m is below T, which is no such value itself.

    A channel that is always multiplied by 0 is never needed: its threshold is infinite.
    """
    rows = torch.cat([s.rows for s in seen]).double()
    mean = torch.stack([s.squares for s in seen]).sum(0) / sum(s.count for s in seen)
    importance = (rows.square() * mean).flatten()
    place = min(len(importance), max(1, round(sparsity * len(importance))))
    below, above = (importance.kthvalue(min(n, len(importance)))[0] for n in (place, place + 1))
    return torch.where(mean > 0, ((below + above) / 2 / mean).sqrt(), torch.inf).float()
