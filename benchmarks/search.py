"""The search beside single passes on the shipped language model: held-out KL at equal measured latency, at equal size.

    python -m benchmarks.search --calibration FOLDER [--windows 8] [--json out/search.json] [--svg out/search.svg]

FOLDER has .txt files to fit to; the held-out text is examples/data. Every model is rewritten, built and timed in turn
with the others; KL is that of the rewritten program from the float program.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import sylvester as sv
from benchmarks.drawing import Bar, bars
from benchmarks.quality.recipes import CHARACTERS, HELD, MODEL, WINDOW
from sylvester.backends.cpu import Cpu
from sylvester.compiler import quality
from sylvester.compiler.budget import Budget
from sylvester.compiler.calibration import Calibration, spread
from sylvester.compiler.genome import DROPPED, Genome
from sylvester.compiler.layers import find_layers
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import watching
from sylvester.compiler.recipe import Machine
from sylvester.compiler.samples import parse
from sylvester.compiler.target import Target
from sylvester.passes.search import Search
from sylvester.passes.search_costs import DECODE, alone
from sylvester.passes.search_evolve import Mutation, Settings, evolve
from sylvester.passes.search_judge import Judge
from sylvester.passes.search_table import Table
from sylvester.passes.search_world import World
from sylvester.passes.similarity import similarity

FITTED = 16
"""Calibration windows."""
WIDTHS = {"bf16": 16, "int8": 8, "int4": 4, "int3": 3}
SHARES = (1.0, 0.85)
"""Latencies that are compared, as shares of what uniform int4 takes; the first is where int4 itself competes."""
PIECE = 4000
"""Characters of each text."""
RESTARTS, LONGER = 16, 30
"""Random genomes that EvoPress begins with, and generations that take as many tokens as the table of the search."""


@dataclass(frozen=True)
class Row:
    """`bound`: what the model had to keep; `kl` and `ratio` of perplexities on held-out text."""

    group: str
    name: str
    bound: float
    kl: float
    ratio: float
    latency: float
    size: int


@dataclass(frozen=True)
class Setting:
    """What all candidates share; `table` has the costs, `judge` scores on calibration data."""

    program: Program
    machine: Machine
    world: World
    judge: Judge
    table: Table


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    program = _calibrated(options.calibration, options.windows)
    machine = Cpu().machine(program, Target(threads=options.threads))
    assert machine is not None
    with watching(_progress):
        rows = _rows(program, machine, Settings(options.generations, options.offspring), options.shares)
    print(_text(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.svg:
        options.svg.write_text(_drawn(rows), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--offspring", type=int, default=16)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the latency of int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    return parser


def _calibrated(folder: Path, windows: int) -> Program:
    """Windows to fit to from every file, and held-out ones."""
    program = sv.trace(MODEL)
    files = sorted(folder.glob("*.txt"))
    if not files:
        sys.exit(f"no .txt files in {folder}")
    texts = [path.read_text(encoding="utf-8")[CHARACTERS:][:PIECE] for path in files]
    book = HELD.read_text(encoding="utf-8")
    pieces = [book[i * len(book) // windows :][:PIECE] for i in range(windows)]
    program.calibration = Calibration(_windows(program, texts, FITTED), _windows(program, pieces, windows))
    return program


def _windows(program: Program, texts: Sequence[str], count: int) -> tuple[Any, ...]:
    """So many whole windows, spread over the texts."""
    found = [s for s in parse(program, Calibration(tuple(texts), ())).fit if _whole(s)]
    return spread(found, min(count, len(found)))


def _whole(sample: Mapping[str, Any]) -> bool:
    return next(iter(sample.values())).shape[1] == WINDOW


def _rows(program: Program, machine: Machine, settings: Settings, shares: Sequence[float]) -> list[Row]:
    def searched(**bounds: float) -> tuple[Genome, dict[str, Any]]:
        search = Search(budget=Budget(**bounds), generations=settings.generations, offspring=settings.offspring)
        found: Any = search.expand(program, machine).facts["search"]
        return Genome.parse(found["chosen"]["genome"]), found

    world = World.of(program, "plain", ())
    uniform = {name: world.sites.genome(bits) for name, bits in WIDTHS.items()}
    # The first search measures the table that everything else is compared by.
    _, facts = searched(size=float(10 * program.weights.nbytes))
    table = _loaded(facts["table"])
    judge = Judge([world], spread(program.calibration.fit if program.calibration else (), 8))
    setting = Setting(program, machine, world, judge, table)
    wanted: dict[tuple[str, str], tuple[Genome, float]] = {}
    int4 = table.costs(uniform["int4"])
    for share in shares:
        latency, group = int4.latency * share, f"latency of int4 x {share:.2f}"
        wanted[group, "search"] = searched(latency=latency)[0], latency
        for name, genome in _rivals(setting, uniform, latency, settings).items():
            wanted[group, name] = genome, latency
    for name in ("int4", "int8"):
        size, group = table.costs(uniform[name]).size, f"size of {name}"
        wanted[group, "search"] = searched(size=size)[0], size
        wanted[group, f"uniform {name}"] = uniform[name], size
    return _measured(setting, wanted)


def _loaded(table: Any) -> Table:
    from sylvester.compiler.schema import load

    return load(Table, json.loads(json.dumps(table)))


def _rivals(setting: Setting, uniform: Mapping[str, Genome], latency: float, settings: Settings) -> dict[str, Genome]:
    """Single passes that keep a latency, and EvoPress alone."""
    count = len(setting.world.sites.inner)
    even = sorted(range(1, count - 1), key=lambda i: (-((i * 0.618) % 1), i))
    alike = similarity(setting.program, find_layers(setting.program))
    ranked = sorted(range(count), key=lambda i: -alike[i])
    found = {f"uniform {name}": g for name, g in uniform.items() if setting.table.costs(g).latency <= latency * 1.001}
    float_ = setting.world.sites.genome()
    for name, base in (("", float_), (" of int8", uniform["int8"]), (" of int4", uniform["int4"])):
        for rule, order in (("uniform skipping", even), ("drop by similarity", ranked)):
            genome = _shortened(setting.table, base, order, latency)
            if genome is not None:
                found[rule + name] = genome
    for name, widths in (("depth", ()), ("bits and depth", (8, 4, 3))):
        found[f"EvoPress alone, {name}"] = _evolved(setting, latency, settings, widths)
    return {name: genome for name, genome in found.items() if genome is not None}


def _shortened(table: Table, base: Genome, order: Sequence[int], latency: float) -> Genome | None:
    """Whole layers dropped in this order until the step is short enough."""
    parts = list(base.parts)
    for i in order:
        if table.costs(Genome(base.outer, tuple(parts), base.shares)).latency <= latency:
            break
        parts[i] = (DROPPED,) * len(parts[i])
    genome = Genome(base.outer, tuple(parts), base.shares)
    return genome if table.costs(genome).latency <= latency else None


def _evolved(setting: Setting, latency: float, settings: Settings, widths: Sequence[int]) -> Genome | None:
    """From random genomes, with as many models scored as the search takes for its table and its generations."""
    table = setting.table if widths else _depth_only(setting.table)
    random = Random(0)
    mutation = Mutation(table, 0, {"latency": latency}, random)
    starts = [genome for _ in range(RESTARTS) if (genome := mutation.restart()) is not None]
    if not starts:
        return None
    setting.judge.anchor(setting.world.sites.genome())
    longer = Settings(settings.generations + LONGER, settings.offspring)

    def fitness(genome: Genome, samples: tuple[int, ...] | None) -> float:
        return setting.judge.score(genome, samples).mean

    return evolve(starts, fitness, lambda _: mutation, len(setting.judge.samples), random, longer).best


def _depth_only(table: Table) -> Table:
    """Parts in float or not at all."""

    def kept(place: Any) -> Any:
        return type(place)(place.name, place.private, tuple(o for o in place.options if o.bits in (32, DROPPED)))

    world = table.worlds[0]
    layers = tuple(type(layer)(tuple(map(kept, layer.places)), ()) for layer in world.layers)
    outer = tuple(map(kept, world.outer))
    made = type(world)(world.name, world.size, world.seconds, world.state, outer, layers)
    return type(table)(table.machine, table.timed, table.perplexity, table.context, table.reference, (made,))


def _measured(setting: Setting, wanted: Mapping[tuple[str, str], tuple[Genome, float]]) -> list[Row]:
    """Each genome rewritten once, all steps timed in one race."""
    genomes = dict.fromkeys(genome for genome, _ in wanted.values())
    held = setting.program.calibration.held if setting.program.calibration else ()
    qualities, sizes, programs = {}, {}, []
    for genome in genomes:
        made = Pipeline(setting.world.realise(genome), check=False)(setting.program)
        qualities[genome] = quality.compare(setting.program, made, held)
        sizes[genome] = setting.machine.footprint(made).size
        programs.append(alone(made))
    steps = dict(zip(genomes, setting.machine.steps(programs, DECODE, setting.table.context), strict=True))
    rows = []
    for (group, name), (genome, bound) in wanted.items():
        found = qualities[genome]
        ratio = found.perplexity / found.perplexity_before
        rows.append(Row(group, name, bound, found.kl, ratio, steps[genome].seconds, sizes[genome]))
    return rows


def _text(rows: Sequence[Row]) -> str:
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines.append(f"\n{group}")
        for row in sorted((row for row in rows if row.group == group), key=lambda row: row.kl):
            costs = f"{row.latency * 1e3:.4f} ms  {row.size / 1e6:.3f} MB"
            lines.append(f"  {row.name:32} KL {row.kl:.4f}  perplexity x{row.ratio:.3f}  {costs}")
    return "\n".join(lines)


def _drawn(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Bar]] = {}
    for row in sorted(rows, key=lambda row: row.kl):
        label = f"{row.name}"
        groups.setdefault(f"{row.group}: held-out KL, nats", []).append(Bar(label, row.kl, ours=row.name == "search"))
    return bars(groups, form="{:.4f}")


def _progress(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done}/{total}", end="\x1b[K", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
