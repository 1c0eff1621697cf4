"""What a page of the shipped model downloads, and how soon its first token is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser

from benchmarks.web.browser import REST
from benchmarks.web.packages import minified

FIRST = """async ([url, ids]) => (await import("/pages/sylvester.js")).firstToken({ url, ids })"""
IDS = [300, 77, 1030, 900]


@dataclass(frozen=True)
class Fact:
    """A number of the shipped model beside the most that it may be."""

    name: str
    found: float
    most: float
    unit: str

    def __str__(self) -> str:
        verdict = "met" if self.found <= self.most else "missed"
        return f"{self.name:44} {self.found:8.1f} {self.unit:3} of at most {self.most:g}: {verdict}"


def sizes(bundle: Path, modules: Path) -> Iterator[Fact]:
    largest = max((bundle / "code").glob("*.wasm"), key=lambda path: path.stat().st_size)
    yield Fact(f"code of one build ({largest.stem})", largest.stat().st_size / 1e3, 150, "KB")
    runtime = minified(bundle, modules)
    yield Fact("runtime, minified, without the tokenizer", runtime / 1e3, 40, "KB")
    yield Fact("more once tuning runs", (minified(bundle, modules, later=True) - runtime) / 1e3, 10, "KB")


def first_token(browser: Browser, site: str, url: str, runs: int) -> Fact:
    """The median over pages that are opened anew, after one visit that stores the model."""
    context = browser.new_context()
    times = []
    for _ in range(runs + 1):
        page = context.new_page()
        page.goto(f"{site}pages/blank.html")
        time.sleep(REST)
        times.append(page.evaluate(FIRST, [url, IDS])["ms"])
        page.close()
    context.close()
    return Fact("load and first token from storage", statistics.median(times[1:]), 300, "ms")
