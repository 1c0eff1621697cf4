"""min sum score x subject to sum x = 1 per part and sum cost x <= limit: which option each part gets (Puzzle).

Bercovich et al. 2024. A block that shares reads the weights of a block before it, which then has its own at the same
bits; solved by HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.genome import DROPPED, Genome
from sylvester.passes.search_table import Loss, Option, Place, WorldTable, held

SECONDS = 20.0
"""How long one programme may take; the best solution so far is used then."""
GAP = 1e-6
SCORE, RISE = "score", "rise"
QUANTITIES = ("size", "latency", "memory", SCORE, RISE)
Key = tuple[int, int, int, int]
"""Block (-1: outside), number of the site in it, bits, distance of the block whose weights are read (0: its own)."""


@dataclass
class _Programme:
    """The variables of a world with their coefficients, by quantity."""

    table: WorldTable
    keys: list[Key] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})

    def __post_init__(self) -> None:
        for n, place in enumerate(self.table.outer):
            for option in place.options:
                self._add((-1, n, option.bits, 0), place, option)
        for i, layer in enumerate(self.table.layers):
            for n, place in enumerate(layer.places):
                for option in place.options:
                    self._add((i, n, option.bits, 0), place, option)
                    for distance, loss in enumerate(layer.shared if option.bits != DROPPED else (), 1):
                        # What sharing loses is the block's, so that its first site carries it.
                        self._add((i, n, option.bits, distance), place, option, None if n else loss)
        self.at = {key: n for n, key in enumerate(self.keys)}
        start = self.table
        self.fixed = {"size": start.size, "latency": start.seconds, "memory": start.state + start.size}

    def _add(self, key: Key, place: Place, option: Option, loss: Loss | None = None) -> None:
        self.keys.append(key)
        size, more = held(place, option, key[3]), loss or Loss(0.0, 0.0)
        values = (size, option.seconds, size + option.state, option.score + more.score, option.rise + more.rise)
        for name, value in zip(QUANTITIES, values, strict=True):
            self.terms[name].append(value)

    def choices(self) -> list[dict[int, float]]:
        """Rows that sum to 1: each site has one option."""
        rows: dict[tuple[int, int], dict[int, float]] = {}
        for n, (block, site, _, _) in enumerate(self.keys):
            rows.setdefault((block, site), {})[n] = 1.0
        return list(rows.values())

    def couplings(self) -> list[dict[int, float]]:
        """Rows that are at most 0: what is read must be there, and a block shares as a whole."""
        rows = []
        for n, (block, site, bits, distance) in enumerate(self.keys):
            if distance:
                before = self.at.get((block - 1, site, bits, distance - 1))
                rows.append({n: 1.0} if before is None else {n: 1.0, before: -1.0})
        for i, layer in enumerate(self.table.layers):
            for distance in range(1, len(layer.shared) + 1):
                rows += self._whole(i, distance, len(layer.places))
        return rows

    def _whole(self, block: int, distance: int, sites: int) -> list[dict[int, float]]:
        """The first site shares exactly when each other site does: two rows for each."""

        def shares(site: int, sign: float) -> dict[int, float]:
            found = (n for n, key in enumerate(self.keys) if (key[0], key[1], key[3]) == (block, site, distance))
            return dict.fromkeys(found, sign)

        return [shares(0, a) | shares(site, -a) for site in range(1, sites) for a in (1.0, -1.0)]

    def differing(self, genome: Genome, most: int) -> tuple[dict[int, float], float]:
        """A row: all but so many sites are as in the genome."""
        same = [(-1, n, bits, 0) for n, bits in enumerate(genome.outer)]
        for i, (parts, distance) in enumerate(zip(genome.parts, genome.shares, strict=True)):
            same += [(i, n, bits, distance) for n, bits in enumerate(parts)]
        return {self.at[key]: -1.0 for key in same}, float(most - len(same))

    def genome(self, values: Sequence[float], world: int) -> Genome:
        taken = [key for key, value in zip(self.keys, values, strict=False) if value > 0.5]
        outer = tuple(bits for block, _, bits, _ in taken if block < 0)
        parts: list[list[int]] = [[] for _ in self.table.layers]
        shares = [0] * len(parts)
        for block, _, bits, distance in taken:
            if block >= 0:
                parts[block].append(bits)
                shares[block] = distance
        return Genome(outer, tuple(map(tuple, parts)), tuple(shares), world)


def minimise(
    table: WorldTable,
    world: int,
    objective: Mapping[str, float],
    limits: Mapping[str, float],
    near: tuple[Genome, int] | None = None,
) -> Genome | None:
    """The genome with the least weighted sum of `QUANTITIES` within the limits; None when there is none.

    `near` a genome: at most so many sites may differ from it.
    """
    made = _Programme(table)
    rows = [_within(made, name, limit) for name, limit in limits.items()]
    rows += [made.differing(*near)] if near else []
    values = _solve(made, _weighted(made, objective), rows, 0)
    return None if values is None else made.genome(values, world)


def nearest(table: WorldTable, world: int, limits: Mapping[str, float]) -> tuple[Genome, float]:
    """The genome whose excess over the limits, as a share of each, is least in sum; and that sum."""
    made = _Programme(table)
    names = list(limits)
    count = len(made.keys)
    rows = []
    for n, name in enumerate(names):
        scale = limits[name] or 1.0
        row = {i: value / scale for i, value in enumerate(made.terms[name]) if value}
        rows.append((row | {count + n: -1.0}, (limits[name] - made.fixed.get(name, 0.0)) / scale))
    tie = 1e-6 / max(max(made.terms[SCORE]), 1e-9)
    goal = [tie * score for score in made.terms[SCORE]] + [1.0] * len(names)
    values = _solve(made, goal, rows, len(names))
    if values is None:
        raise CompileError("the solver found no choice for the parts of the model at all")
    return made.genome(values, world), float(sum(values[count:]))


def _weighted(made: _Programme, objective: Mapping[str, float]) -> list[float]:
    """Coefficients in units of the middle one: the solver takes differences below 1e-6 for none."""
    total = np.zeros(len(made.keys))
    for name, weight in objective.items():
        total += weight * np.array(made.terms[name])
    some = np.abs(total[total != 0])
    return list(total / (np.median(some) if len(some) else 1.0))


def _within(made: _Programme, name: str, limit: float) -> tuple[dict[int, float], float]:
    """A row in units of what the choices may use."""
    left = limit - made.fixed.get(name, 0.0)
    scale = abs(left) or 1.0
    return {i: value / scale for i, value in enumerate(made.terms[name]) if value}, left / scale


def _solve(
    made: _Programme, goal: Sequence[float], limits: Sequence[tuple[dict[int, float], float]], slacks: int
) -> Any:
    """The values of all variables, binaries first; None when there is no solution."""
    optimize, sparse = _scipy()
    count = len(made.keys) + slacks
    equal, below = made.choices(), made.couplings()
    rows = [*equal, *below, *(row for row, _ in limits)]
    matrix = sparse.lil_matrix((len(rows), count))
    for r, row in enumerate(rows):
        for column, value in row.items():
            matrix[r, column] = value
    upper = [1.0] * len(equal) + [0.0] * len(below) + [bound for _, bound in limits]
    lower = [1.0] * len(equal) + [-np.inf] * (len(rows) - len(equal))
    binaries = len(made.keys)
    # Some versions write to stdout when they presolve, and programmes of this size are no slower without.
    found = optimize.milp(
        np.array(goal),
        integrality=np.array([1] * binaries + [0] * slacks),
        bounds=optimize.Bounds(np.zeros(count), np.array([1.0] * binaries + [np.inf] * slacks)),
        constraints=optimize.LinearConstraint(matrix.tocsr(), np.array(lower), np.array(upper)),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
    )
    return found.x


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise Unsupported(
            "a budget is solved by scipy, which is not installed", hint="pip install 'sylvester[search]'"
        ) from error
    return optimize, sparse
