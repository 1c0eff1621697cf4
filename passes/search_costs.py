"""t = t_fixed + sum t_site(bits), measured on the target: models in which each width stands at every site once.

In model number s the sites of block l have width (l + s) mod n, so that all widths are timed in place and in turn. The
time of a kernel belongs to the site whose weights it reads; what belongs to none, and what a call takes besides its
kernels, is fixed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from torch import fx

from sylvester.compiler.cost import hint
from sylvester.compiler.genome import FLOAT, Genome, Sites
from sylvester.compiler.layer_lines import slots_of
from sylvester.compiler.layers import find_layers
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Entry, Program, binding, is_weight
from sylvester.compiler.recipe import Footprint, Machine, Step
from sylvester.passes.search_weights import replaced_weights
from sylvester.passes.search_world import World

DECODE = "decode"
SHORT_BYTES = 2
At = tuple[int, int]
"""Block (-1: outside), number of the site in it."""


@dataclass
class SiteCosts:
    """Bytes of matrices and seconds of a step by site and bits; by site its other vectors and its caches."""

    size: dict[tuple[At, int], float] = field(default_factory=dict)
    seconds: dict[tuple[At, int], float] = field(default_factory=dict)
    private: dict[At, float] = field(default_factory=dict)
    state: dict[At, float] = field(default_factory=dict)
    fixed_size: float = 0.0
    fixed_seconds: float = 0.0
    fixed_state: float = 0.0
    reference: float = 0.0
    """Seconds of a step of the first model."""


def measure(world: World, original: Program, machine: Machine | None, widths: Sequence[int], context: int) -> SiteCosts:
    """Costs of a world; without a machine the bytes that are stored, and no times."""
    owners = Owners(world)
    levels = (FLOAT, *widths)
    if machine is None or DECODE not in original.entries:
        return _stored(world, owners, levels)
    genomes = [_rotated(world.sites, levels, shift) for shift in range(len(levels))]
    models = [_made(world, original, genome) for genome in genomes]
    single = [alone(model) for model in models]
    steps = machine.steps(single, DECODE, context)
    prints = [machine.footprint(program) for program in single]
    costs = SiteCosts(reference=steps[0].seconds)
    fixed_seconds, fixed_sizes = [], []
    seconds: dict[tuple[object, int], list[float]] = defaultdict(list)
    for genome, model, step, found in zip(genomes, models, steps, prints, strict=True):
        names = replaced_weights(world.program, model)
        bits = owners.bits(genome)
        fixed_sizes.append(_sizes(costs, owners, names, bits, found))
        spent, rest = _spent(owners, model.entries[DECODE], names, step)
        fixed_seconds.append(rest)
        for at, time in spent.items():
            seconds[owners.form(at), bits[at]].append(time)
    for at in owners.sites:
        for b in levels:
            costs.seconds[at, b] = median(seconds.get((owners.form(at), b), [0.0]))
    costs.fixed_seconds, costs.fixed_size = median(fixed_seconds), median(fixed_sizes)
    _states(costs, owners, machine.footprint(models[0]))
    return costs


def _stored(world: World, owners: Owners, levels: Sequence[int]) -> SiteCosts:
    """Bytes of numbers and scales, without knowing how a target lays them out."""
    costs = SiteCosts()
    total = float(world.program.weights.nbytes)
    for at, keys in owners.sites.items():
        for b in levels:
            costs.size[at, b] = float(sum(world.weights.nbytes(key, b) for key in keys)) + owners.biases[at]
        costs.private[at] = float(sum(world.program.weights[key].nbytes for key in owners.private[at]))
        total -= costs.size[at, FLOAT] + costs.private[at]
    costs.fixed_size = total
    slots = {name: _shortened(world.program, name) for name in world.program.state}
    for at in owners.sites:
        costs.state[at] = sum(slots[name] for name in owners.slots.get(at, ()))
    costs.fixed_state = sum(slots.values()) - sum(costs.state.values())
    return costs


@dataclass
class Owners:
    """Which site a weight, a cache and a node of the decode entry belongs to."""

    world: World
    sites: dict[At, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        found = self.world.sites
        groups = [(-1, found.outer), *enumerate(found.inner)]
        self.sites = {(block, n): site.keys for block, sites in groups for n, site in enumerate(sites)}
        self.kinds = {(block, n): site.kind for block, sites in groups for n, site in enumerate(sites)}
        self.matrices = {key: at for at, keys in self.sites.items() for key in keys}
        self.others: dict[str, At] = {}
        self.biases: dict[At, float] = dict.fromkeys(self.sites, 0.0)
        self.private: dict[At, list[str]] = {at: [] for at in self.sites}
        self.slots: dict[At, tuple[str, ...]] = {}
        self._read_parts()
        self._read_slots()

    def bits(self, genome: Genome) -> dict[At, int]:
        outer = {(-1, n): bits for n, bits in enumerate(genome.outer)}
        return outer | {(i, n): bits for i, parts in enumerate(genome.parts) for n, bits in enumerate(parts)}

    def form(self, at: At) -> object:
        """Equal for sites that run the same kernels."""
        block = self.world.sites.blocks[at[0]].form if at[0] >= 0 else ()
        return self.kinds[at], at[1], block

    def of(self, key: str) -> At | None:
        return self.matrices.get(key, self.others.get(key))

    def _read_parts(self) -> None:
        """Vectors that only one site reads: biases of its layers go with these, norms stay with the site."""
        weights = self.world.program.weights
        for (block, n), kind in self.kinds.items():
            parts = self.world.sites.blocks[block].parts if block >= 0 else ()
            inside = {node for part in parts if part.kind == kind for node in part.nodes}
            for weight in dict.fromkeys(u for node in inside for u in node.all_input_nodes if is_weight(u)):
                key = binding(weight).key
                if key in self.matrices or not inside.issuperset(weight.users):
                    continue
                self.others[key] = (block, n)
                if any("linear" in str(user.target) for user in weight.users):
                    self.biases[block, n] += weights[key].nbytes
                else:
                    self.private[block, n].append(key)

    def _read_slots(self) -> None:
        """The caches that the parts of a site keep in the decode entry."""
        for i, layer in enumerate(find_layers(self.world.program)):
            for n, site in enumerate(self.world.sites.inner[i]):
                parts = layer.sites[DECODE].of_kind(site.kind) if DECODE in layer.sites else []
                self.slots[i, n] = tuple(dict.fromkeys(slot for part, _ in parts for slot in slots_of(part)))


def reference(world: World, original: Program, widths: Sequence[int]) -> Program:
    """The first of the models that were timed, to see how fast the machine is at another time."""
    return alone(_made(world, original, _rotated(world.sites, (FLOAT, *widths), 0)))


def _rotated(sites: Sites, levels: Sequence[int], shift: int) -> Genome:
    """Width (l + s) mod n for block l, and for what is outside width s."""
    outer = (levels[shift % len(levels)],) * len(sites.outer)
    parts = tuple((levels[(i + shift) % len(levels)],) * len(group) for i, group in enumerate(sites.inner))
    return Genome(outer, parts, (0,) * len(parts))


def _made(world: World, original: Program, genome: Genome) -> Program:
    """The model of a genome; times do not depend on how well its weights are rounded."""
    bare = original.clone()
    bare.calibration = None
    return Pipeline(world.realise(genome, method="rtn"), check=False)(bare)


def alone(model: Program) -> Program:
    """With the decode entry only."""
    made = Program(model.weights.clone(), {DECODE: model.entries[DECODE]}, dict(model.state), dict(model.info))
    made.sweep()
    return made


def _sizes(
    costs: SiteCosts,
    owners: Owners,
    names: Mapping[str, tuple[int, tuple[str, ...]]],
    bits: Mapping[At, int],
    found: Footprint,
) -> float:
    """Bytes of every site at its width go to `costs`; returns what belongs to none."""
    source = {name: key for key, (_, stored) in names.items() for name in stored}
    fixed, sizes, private = 0.0, defaultdict[At, float](float), defaultdict[At, float](float)
    for keys, nbytes in found.stored.items():
        own = [source.get(key, key) for key in keys]
        at = next((at for key in own if (at := owners.of(key)) is not None), None)
        if at is None:
            fixed += nbytes
        elif set(own) <= set(owners.private[at]):
            private[at] += nbytes
        else:
            sizes[at] += nbytes
    for at in owners.sites:
        costs.size[at, bits[at]] = sizes[at]
        costs.private[at] = private[at]
    return fixed


def _spent(
    owners: Owners, entry: Entry, names: Mapping[str, tuple[int, tuple[str, ...]]], step: Step
) -> tuple[dict[At, float], float]:
    """Seconds of every site, and what is left of the call."""
    source = {name: key for key, (_, stored) in names.items() for name in stored}
    place: dict[fx.Node, At] = {}
    for node in entry.calls():
        keys = [source.get(binding(u).key, binding(u).key) for u in node.all_input_nodes if is_weight(u)]
        at = next((at for key in keys if (at := owners.of(key)) is not None), None)
        if at is not None:
            place[node] = at
    weighted = {node.name: at for node, at in place.items() if "linear" in str(node.target)}
    for node in reversed(entry.calls()):
        found = {place.get(user) for user in node.users if user.op != "output"}
        if node not in place and len(found) == 1 and (at := found.pop()) is not None:
            place[node] = at
    named = {node.name: at for node, at in place.items()}
    spent: dict[At, float] = defaultdict(float)
    for labels, seconds in step.kernels:
        own = [weighted[label] for label in labels if label in weighted] or [
            named[label] for label in labels if label in named
        ]
        if own:
            spent[own[0]] += seconds
    return spent, step.seconds - sum(spent.values())


def _states(costs: SiteCosts, owners: Owners, whole: Footprint) -> None:
    """The caches of a process, shared out by what each slot holds, and what it takes besides weights and caches."""
    program = owners.world.program
    slots = {name: float(_nbytes(program, name)) for name in program.state}
    scale = whole.state / max(sum(slots.values()), 1.0)
    for at in owners.sites:
        costs.state[at] = scale * sum(slots[name] for name in owners.slots.get(at, ()))
    costs.fixed_state = whole.running - whole.size - sum(costs.state.values())


def _shortened(program: Program, name: str) -> float:
    """Bytes of a slot for one row once its floats are bfloat16."""
    slot = program.state[name]
    return _nbytes(program, name) * min(slot.dtype.itemsize, SHORT_BYTES) / slot.dtype.itemsize


def _nbytes(program: Program, name: str) -> int:
    """Bytes of a slot for one row."""
    slot = program.state[name]
    count = 1
    for n in slot.shape[1:]:
        count *= hint(n)
    return count * slot.dtype.itemsize
