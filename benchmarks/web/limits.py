"""What a page can do at most, measured between the engines: reads at the working sets of a work, and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser

from benchmarks.web.browser import Tab
from benchmarks.web.works import PageWork
from sylvester.backends.limits import Limits, Peak, Read
from sylvester.backends.toolchain import build_shared, find_compiler
from sylvester.codegen.isa import THREADED, WASM

SOURCE = Path(__file__).with_name("limits.c")
ARITHMETIC = ("int8", "int16", "f32")
PASSES = 5
MEASURE = "([what, given]) => globalThis.engine.measure[what](given)"


def build(folder: Path) -> Path:
    """The module of limits.c, for threads over one memory."""
    compiler = find_compiler("ziglang", architecture=WASM)
    return build_shared(SOURCE.read_text(), folder / "limits.wasm", THREADED[-1], compiler=compiler)


@dataclass
class Probe:
    """The page of the limits; `rates` are the best so far, by working set or arithmetic."""

    tab: Tab
    work: PageWork
    rates: dict[int | str, float]

    @classmethod
    def open(cls, browser: Browser, site: str, work: PageWork) -> Probe:
        sizes = [int(work.read(precision)) for precision in work.precisions]
        options = {"url": "/limits/limits.wasm", "threads": work.threads, "bytes": max(sizes) + (1 << 20)}
        return cls(Tab.open(browser, site, "limits", options), work, dict.fromkeys([*sizes, *ARITHMETIC], 0.0))

    def block(self) -> None:
        for key in self.rates:
            text = isinstance(key, str)
            what, asked = ("peak", {"arithmetic": key}) if text else ("read", {"size": key})
            found = [self.tab.page.evaluate(MEASURE, [what, asked]) for _ in range(PASSES)]
            self.rates[key] = max(self.rates[key], *found)

    def limits(self, browser: str) -> Limits:
        threads = self.work.threads
        reads = [Read(key, False, threads, rate) for key, rate in self.rates.items() if isinstance(key, int)]
        peaks = [Peak(key, "vector", threads, rate) for key, rate in self.rates.items() if isinstance(key, str)]
        return Limits(browser, threads, "ziglang", tuple(sorted(reads, key=lambda r: r.bytes)), tuple(peaks))
