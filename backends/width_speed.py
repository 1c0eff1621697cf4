"""How long a linear layer takes with weights of each width on this machine: are fewer bits also faster?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import cast

from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuning import runnable
from sylvester.backends.tuning_bench import Bench, build
from sylvester.codegen.isa import variants
from sylvester.codegen.layout import FormatName
from sylvester.codegen.space import Candidate, Problem
from sylvester.codegen.tunable import family_of
from sylvester.compiler import knobs
from sylvester.compiler.progress import report
from sylvester.compiler.target import Target

ROUNDS, RUNS = 9, 5
FORMATS: Mapping[int, str] = {32: "f32", 16: "bf16", 8: "q8", 4: "q4/32", 3: "q3/32"}
"""Bits of a weight -> the format of its kernel."""
Seconds = dict[int, float]


def linear_seconds(
    shapes: Iterable[tuple[int, int]], bits: Iterable[int], rows: int, target: Target
) -> dict[tuple[int, int], Seconds]:
    """Median seconds of one layer [n, k] by the bits of its weights, with `rows` rows and weights out of the cache.

    The widths of a shape run in turn, so that what else the machine does meets all of them.
    """
    tried, sizes = list(dict.fromkeys(bits)), list(dict.fromkeys(shapes))
    compiler, threads = find_compiler(architecture=target.architecture), target.threads or knobs.threads()
    names = {cast(FormatName, FORMATS[b].partition("/")[0]) for b in tried}
    isa = runnable(variants(names, target.architecture, target.isas), target, compiler)
    found = {}
    with tempfile.TemporaryDirectory(prefix="sylvester-widths-") as folder:
        for done, (n, k) in enumerate(sizes):
            report("time layers", done, len(sizes))
            with ExitStack() as opened:
                benches = {}
                for b in tried:
                    problem = Problem.linear(FORMATS[b], rows, n, k)
                    family = family_of(problem)
                    library = {Candidate(): build(family, isa, Candidate(), Path(folder), compiler)}
                    benches[b] = opened.enter_context(closing(Bench(library, family, problem, threads)))
                found[n, k] = _race(benches)
    return found


def _race(benches: Mapping[int, Bench]) -> Seconds:
    for bench in benches.values():
        bench.check()  # also finds how often a short layer runs for one time
    times: dict[int, list[int]] = {b: [] for b in benches}
    for _ in range(ROUNDS):
        for b, bench in benches.items():
            times[b] += bench.measure(Candidate(), RUNS)
    return {b: median(found) / 1e9 for b, found in times.items()}
