"""Launches that may be tuned, at sizes at which they run: what is timed, and how it is told from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_lowering import Candidate
from sylvester.codegen.gpu_plan import Argument, ErrorFlag, GpuEntry, Launch
from sylvester.codegen.index import Atom, Index, Size, index
from sylvester.codegen.lazy import Pointer
from sylvester.codegen.space import Candidate as Named

MANY = 512
"""Rows at which kernels for many are timed where the entry has no other size."""


@dataclass(frozen=True)
class Site:
    """A launch of an entry and values of the sizes that it is timed at."""

    entry: GpuEntry
    launch: Launch
    sizes: Mapping[Atom, Index]

    def number(self, value: Index) -> int:
        found = value.substitute(self.sizes).constant
        assert found is not None
        return found

    @property
    def numbers(self) -> dict[str, Any]:
        """Arguments that are no addresses, by name."""
        pairs = zip(self.launch.kernel.types, self.launch.arguments, strict=True)
        return {name: self._plain(a) for name, a in pairs if not isinstance(a, Pointer | ErrorFlag)}

    def _plain(self, argument: Argument) -> Any:
        return self.number(argument) if isinstance(argument, Index) else argument

    def grid(self, candidate: Candidate) -> tuple[int, ...]:
        return tuple(self.number(n) for n in candidate.grid)

    @property
    def problem(self) -> str:
        """What decides how fast its candidates are: launches with the same one are timed once."""
        kernel = self.launch.kernel
        types = " ".join(sorted(set(kernel.types.values())))
        fixed = {name: v for name, v in kernel.constants.items() if name not in tiling(self)}
        return f"{kernel.function} {numbers_text(self.numbers)} {numbers_text(fixed)} {types}"

    def candidates(self) -> dict[Named, Candidate]:
        """By what differs from the launch's own, which is first."""
        first = Candidate(self.launch.kernel, self.launch.grid)
        return {difference(first.kernel, c.kernel): c for c in (first, *self.launch.others())}


def tiling(site: Site) -> set[str]:
    """Constants that candidates differ in."""
    first = site.launch.kernel.constants
    return {name for c in site.launch.others() for name in first if c.kernel.constants[name] != first[name]}


def difference(first: Kernel, other: Kernel) -> Named:
    """Constants, warps and stages of `other` that are not those of the first."""
    changed = {n: int(v) for n, v in other.constants.items() if v != first.constants[n] and not isinstance(v, str)}
    around = {"warps": (first.warps, other.warps), "stages": (first.stages, other.stages)}
    return Named(changed | {name: b for name, (a, b) in around.items() if a != b})


def numbers_text(found: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(found.items()))


def sites(entry: GpuEntry, hints: Mapping[Size, int]) -> Iterator[Site]:
    """Every launch that has candidates and runs at some size tried: the hints, one row, a few, many."""
    for launch in entry.launches:
        values = next((v for v in _tried(entry, hints) if _runs(launch, v)), None)
        if values is not None and launch.others():
            yield Site(entry, launch, values)


def _tried(entry: GpuEntry, hints: Mapping[Size, int]) -> Iterator[dict[Atom, Index]]:
    yield {size: index(hints.get(size, 1)) for size in entry.sizes}
    for rows in (1, 4, MANY):
        for chosen in entry.sizes or (None,):
            yield {size: index(rows if size is chosen else 1) for size in entry.sizes}


def _runs(launch: Launch, values: Mapping[Atom, Index]) -> bool:
    grid = [n.substitute(values).constant for n in launch.grid]
    if launch.when is None:
        return all(grid)
    rows = launch.when[0].substitute(values).constant
    return all(grid) and rows is not None and launch.when[1] <= rows <= launch.when[2]
