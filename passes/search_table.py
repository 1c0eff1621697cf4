"""What every choice for every part costs and loses: saved as JSON, and solved for a budget without measuring again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sylvester.compiler.errors import CompileError
from sylvester.compiler.genome import DROPPED, Genome
from sylvester.compiler.schema import SchemaError, load


@dataclass(frozen=True)
class Option:
    """`bits` of a part (0: dropped), what the model loses by this one change, and what the part then costs.

    `score`: KL. `rise`: of the mean -log p of the token that came. `size`: bytes of matrices. `seconds`: of a decode
    step. `state`: bytes of caches at the longest sequence.
    """

    bits: int
    score: float
    rise: float
    size: float
    seconds: float
    state: float


@dataclass(frozen=True)
class Place:
    """One site and its options; `private` bytes stay with it when it reads the matrices of another block."""

    name: str
    private: float
    options: tuple[Option, ...]

    def option(self, bits: int) -> Option:
        return next(option for option in self.options if option.bits == bits)


@dataclass(frozen=True)
class Loss:
    """KL, and the rise of the mean -log p of the token that came."""

    score: float
    rise: float


@dataclass(frozen=True)
class Layer:
    """The sites of a block, and what reading the matrices of the block one before, two before, ... loses."""

    places: tuple[Place, ...]
    shared: tuple[Loss, ...]


@dataclass(frozen=True)
class Costs:
    """Bytes of weights, seconds of a step, bytes of a process."""

    size: float
    latency: float
    memory: float


@dataclass(frozen=True)
class WorldTable:
    """One program that genomes choose for; `size`, `seconds` and `state` are what no choice changes."""

    name: str
    size: float
    seconds: float
    state: float
    outer: tuple[Place, ...]
    layers: tuple[Layer, ...]

    def chosen(self, genome: Genome) -> Iterator[tuple[Place, Option, int]]:
        """Every site with its option and the distance of the block whose matrices it reads."""
        for place, bits in zip(self.outer, genome.outer, strict=True):
            yield place, place.option(bits), 0
        for layer, parts, distance in zip(self.layers, genome.parts, genome.shares, strict=True):
            yield from ((place, place.option(bits), distance) for place, bits in zip(layer.places, parts, strict=True))

    def costs(self, genome: Genome) -> Costs:
        size, seconds, state = self.size, self.seconds, self.state
        for place, option, distance in self.chosen(genome):
            size += held(place, option, distance)
            seconds += option.seconds
            state += option.state
        return Costs(size, seconds, state + size)

    def loss(self, genome: Genome) -> Loss:
        """The sum of what every change loses by itself."""
        losses: list[Loss | Option] = [option for _, option, _ in self.chosen(genome)]
        pairs = zip(self.layers, genome.shares, strict=True)
        losses += [layer.shared[distance - 1] for layer, distance in pairs if distance]
        return Loss(sum(loss.score for loss in losses), sum(loss.rise for loss in losses))

    def uniform(self, bits: int, world: int) -> Genome | None:
        """Every site with these bits, or with the next wider ones; None when no site has them."""
        parts = tuple(tuple(_nearest(place, bits) for place in layer.places) for layer in self.layers)
        outer = tuple(_nearest(place, bits) for place in self.outer)
        used = {b for found in (outer, *parts) for b in found}
        return Genome(outer, parts, (0,) * len(parts), world) if bits in used else None


@dataclass(frozen=True)
class Table:
    """`timed`: whether seconds were measured, on `machine`; `perplexity` is that of the original on the data.

    `reference`: seconds of a step of the first model of `search_costs`, with caches of `context` tokens.
    """

    machine: str
    timed: bool
    perplexity: float
    context: int
    reference: float
    worlds: tuple[WorldTable, ...]

    def world(self, genome: Genome) -> WorldTable:
        return self.worlds[genome.world]

    def costs(self, genome: Genome) -> Costs:
        return self.world(genome).costs(genome)

    def loss(self, genome: Genome) -> Loss:
        return self.world(genome).loss(genome)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Table:
        """Read what `save` wrote, or the table in the report.json of an artefact."""
        try:
            found = json.loads(Path(path).read_bytes())
            search = found.get("search") if isinstance(found, dict) else None
            return load(Table, search["table"] if isinstance(search, dict) else found)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error) if isinstance(error, (OSError, SchemaError)) else f"{type(error).__name__}: {error}"
            raise CompileError(
                f"cannot read the table {str(path)!r}: {reason}", hint="give report.json of a compilation with a budget"
            ) from error


def held(place: Place, option: Option, distance: int) -> float:
    """Bytes of weights of a site that has an option."""
    if option.bits == DROPPED:
        return 0.0
    return place.private if distance else place.private + option.size


def used(costs: Costs) -> Mapping[str, float]:
    """Costs by the field of a budget."""
    return {"size": costs.size, "latency": costs.latency, "memory": costs.memory}


def _nearest(place: Place, bits: int) -> int:
    wider = [option.bits for option in place.options if option.bits >= bits and option.bits != DROPPED]
    return min(wider, default=max(option.bits for option in place.options))
