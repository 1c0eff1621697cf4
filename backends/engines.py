"""Regions of a program that another compiler may build: it has to win each of them against ours by measurement."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import resources
from pathlib import Path

from sylvester.backends import fingerprint, tvm_engine
from sylvester.backends.halving import Measure
from sylvester.backends.kernel_table import KernelSpec
from sylvester.backends.region_bench import RegionBench, build
from sylvester.backends.toolchain import BuildFailed, Compiler
from sylvester.backends.tuner import run_race
from sylvester.backends.tuning import runnable
from sylvester.backends.tuning_database import Database, DatabaseError, Entry, Key, default_path
from sylvester.backends.tvm_engine import Engine, EngineMissing
from sylvester.codegen.isa import Isa
from sylvester.codegen.prelude import render
from sylvester.codegen.region import Refused, Region
from sylvester.codegen.space import Candidate
from sylvester.compiler import knobs
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.progress import Progress, silent
from sylvester.compiler.target import Target

LOADERS: Mapping[str, Callable[[], Engine]] = {"tvm": tvm_engine.load}
OURS = Candidate()
GENERATOR = ("tvm_math.py", "tvm_scalar.py", "tvm_region.py", "tvm_source.py")


@dataclass(frozen=True)
class Claims:
    """What takes the place of our loop nests on the variant `isa`, and for the ledger what became of each."""

    isa: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def on(self, isa: Isa) -> Mapping[str, str]:
        """Text of a nest -> text in its place, for a variant."""
        return self.texts if isa.name == self.isa else {}


@dataclass(frozen=True)
class Setting:
    """Where the code will run, what compiles it, and who competes."""

    isa: Isa
    threads: int
    compiler: Compiler
    engine: Engine

    def key(self, region: Region) -> Key:
        """Where the database keeps a region: the text of both sides, and the versions of both compilers."""
        sizes = "x".join(map(str, region.sizes())) or "fixed"
        compiler = fingerprint.toolchain(self.compiler, self.isa)
        versions = f"{compiler}, {self.engine.name} {self.engine.version}"
        problem = f"region {self.engine.name} {sizes}"
        return Key(_sum(region.function.text), problem, fingerprint.target(self.isa), self.threads, versions)


def claim(
    regions: Sequence[Region],
    isas: Sequence[Isa],
    target: Target,
    compiler: Compiler,
    *,
    seconds: float | None = None,
    progress: Progress = silent,
) -> Claims:
    """What `target.engines` win; with `seconds`, regions that the database does not know are measured."""
    if not target.engines or not regions:
        return Claims()
    (name,) = target.engines
    if knobs.TUNE.get() == "0":
        return _ours(f"{name} is not asked: {knobs.TUNE.name}=0")
    try:
        isa, engine = runnable(isas, target, compiler), LOADERS[name]()
    except EngineMissing as error:
        return _ours(f"{name} is not used: {error}")
    except Unsupported as error:
        return _ours(f"{name} is not used: {error.message}")
    setting = Setting(isa, target.threads or knobs.threads(), compiler, engine)
    try:
        with Database(default_path()) as database:
            return Competition(setting, database, progress).run(regions, seconds)
    except DatabaseError as error:
        if seconds is not None:
            raise
        return _ours(f"{name} is not used: {error.message}")


def _ours(why: str) -> Claims:
    return Claims(notes=(f"{why}: our kernels run",))


class Competition:
    """Races an engine against our functions; what it learns of a region is kept at once."""

    def __init__(
        self,
        setting: Setting,
        database: Database,
        progress: Progress = silent,
        clock: Callable[[], float] = time.monotonic,
        timed: Callable[[RegionBench], Measure] = lambda bench: bench.measure,
    ) -> None:
        self.setting, self.database, self.progress, self.clock, self.timed = setting, database, progress, clock, timed
        self.failed: dict[str, str] = {}
        """Text of a region -> why its engine has nothing to offer."""
        self.wrong: dict[str, str] = {}
        """Text of a region -> what a candidate that others were raced without did."""

    def run(self, regions: Sequence[Region], seconds: float | None) -> Claims:
        """Claims of the database, after measuring what it does not know when there is time for that."""
        found = {r.function.text: self._known(r) for r in regions}
        unknown = [r for r in regions if found[r.function.text] is None]
        if seconds is not None and unknown:
            self._measure(unknown, self.clock() + seconds)
            found |= {r.function.text: self._known(r) for r in unknown}
        texts, notes = {}, []
        for region in sorted(regions, key=lambda r: -r.work()):
            entry = found[region.function.text]
            text = self._winner(region, entry)
            if text:
                texts[region.function.text] = text
            origin = "measured now" if region in unknown else "from the database"
            notes.append(f"{title(region)}: {self._verdict(region, entry, bool(text), origin)}")
        return Claims(self.setting.isa.name, texts, tuple(f"{self.setting.engine.name}: {note}" for note in notes))

    def _known(self, region: Region) -> Entry | None:
        entry = self.database.look_up(self.setting.key(region))
        return entry if entry is not None and entry.finished else None

    def _winner(self, region: Region, entry: Entry | None) -> str:
        """The text that takes the place of ours, empty when ours stays."""
        if entry is None or entry.chosen == str(OURS):
            return ""
        engine, isa = self.setting.engine, self.setting.isa
        try:
            chosen = next(c for c in engine.candidates(region, isa) if str(c) == entry.chosen)
            return engine.source(region, chosen, isa)
        except (Refused, StopIteration) as error:
            self.failed[region.function.text] = str(error) or f"{entry.chosen} is no candidate"
            return ""

    def _verdict(self, region: Region, entry: Entry | None, won: bool, origin: str) -> str:
        name, failed = self.setting.engine.name, self.failed.get(region.function.text)
        if failed:
            return f"{failed}: our kernel runs"
        if entry is None:
            return "not measured: compile with `tune=` seconds: our kernel runs"
        ours = entry.times[str(OURS)].median
        best = min((n for n in entry.times if n != str(OURS)), key=lambda n: entry.times[n].median)
        ratio = ours / max(entry.times[entry.chosen if won else best].median, 1)
        text = f"{name} {ratio:.2f}x, {entry.chosen}" if won else f"ours ({name} {ratio:.2f}x)"
        wrong = self.wrong.get(region.function.text)
        return f"{text}, {ours / 1e3:.1f} us ours, {origin}" + (f"; left out: {wrong}" if wrong else "")

    def _measure(self, regions: Sequence[Region], deadline: float) -> None:
        """Build in half of the time, those with the most work first, and race what was built in the rest."""
        half = (self.clock() + deadline) / 2
        offers = [(r, self._offer(r)) for r in sorted(regions, key=lambda r: -r.work()) if self.clock() < half]
        offers = [(region, texts) for region, texts in offers if len(texts) > 1]
        if not offers or self.clock() >= deadline:
            return
        with tempfile.TemporaryDirectory(prefix="sylvester-regions-") as folder:
            try:
                library = build(offers, self.setting.isa, Path(folder), self.setting.compiler)
            except BuildFailed as error:
                why = f"{self.setting.engine.name} is refused by the C compiler: {error.message.splitlines()[-1]}"
                self.failed |= {region.function.text: why for region, _ in offers}
                return
            first = 0
            for done, (region, texts) in enumerate(offers):
                self.progress(f"{self.setting.engine.name} against ours, {title(region)}", done, len(offers))
                numbers = {c: first + n for n, c in enumerate(texts)}
                first += len(texts)
                with closing(RegionBench(library, region, numbers, self.setting.threads)) as bench:
                    share = (deadline - self.clock()) / (len(offers) - done)
                    self._race(region, bench, list(texts), self.clock() + share)

    def _offer(self, region: Region) -> dict[Candidate, str]:
        """Our text and those of the engine."""
        engine, isa = self.setting.engine, self.setting.isa
        texts = {OURS: region.function.text}
        try:
            texts |= {c: engine.source(region, c, isa) for c in engine.candidates(region, isa)}
        except Refused as error:
            self.failed[region.function.text] = f"{engine.name} has no code: {error}"
        return texts

    def _race(self, region: Region, bench: RegionBench, candidates: Sequence[Candidate], deadline: float) -> None:
        """Only what computes the same as ours may win."""
        checked = {c: bench.wrong(c, OURS) for c in candidates[1:]}
        wrong, fit = (
            {c: why for c, why in checked.items() if why},
            [OURS, *(c for c, why in checked.items() if not why)],
        )
        if len(fit) == 1:
            self.failed[region.function.text] = f"{self.setting.engine.name} is wrong: {next(iter(wrong.values()))}"
            return
        if wrong:
            self.wrong[region.function.text] = "; ".join(f"{c}: {why}" for c, why in wrong.items())
        bench.ready(OURS)
        key = self.setting.key(region)
        run_race(self.database, key, fit, self.timed(bench), spent=lambda: self.clock() >= deadline)


def title(region: Region) -> str:
    """What a region computes, with its example sizes."""
    cost = region.cost
    sizes = "x".join(map(str, region.sizes()))
    named = KernelSpec(cost.name, cost.labels, cost.arithmetic, cost.streams).title
    return f"{named} [{sizes}]" if sizes else named


def _sum(text: str) -> str:
    """Of our function, what it calls, and the code that writes the other."""
    folder = resources.files("sylvester.codegen")
    parts = [render("math.h.in"), *(folder.joinpath(name).read_text(encoding="utf-8") for name in GENERATOR)]
    return sha256("\0".join([text, *parts]).encode()).hexdigest()[:16]
