"""Engines in pages of headless Chromium, each in a context of its own, measured in turns."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

REST = 0.15
"""Seconds between two engines: threads of the last one may spin on."""
WARM, CALLS = 2, 5
LONG = 800.0
"""ms of a call from which on a block has one call to warm up and one that counts."""
OPEN = """async ([engine, options]) => {
  const { open } = await import(`/pages/${engine}.js`);
  globalThis.engine = await open(options);
  return globalThis.engine.facts;
}"""
CHECK = "([what, given]) => globalThis.engine.check[what](given)"
BLOCK = """async ([what, given, warm, calls, long]) => {
  const run = () => globalThis.engine.measure[what](given);
  const times = [];
  for (let n = 0; n < warm + calls; n++) {
    const start = performance.now();
    times.push(await run());
    const passed = performance.now() - start;
    if (passed > long && n) break;
  }
  return times.slice(Math.min(warm, times.length - 1));
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("chromium is not installed: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A page that has an engine open; `values` are what its blocks gave."""

    page: Page
    facts: dict[str, Any]
    values: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, browser: Browser, site: str, engine: str, options: dict[str, Any]) -> Tab:
        """Fails with the error of the page."""
        page = browser.new_context().new_page()
        page.set_default_timeout(180_000)
        page.goto(f"{site}pages/blank.html")
        try:
            return cls(page, page.evaluate(OPEN, [engine, options]))
        except Error:
            page.context.close()
            raise

    def check(self, what: str, given: dict[str, Any]) -> dict[str, Any]:
        return dict(self.page.evaluate(CHECK, [what, given]))

    def block(self, what: str, given: dict[str, Any]) -> None:
        """A few calls in a row, of which the first ones do not count."""
        time.sleep(REST)
        self.values += self.page.evaluate(BLOCK, [what, given, WARM, CALLS, LONG])

    def close(self) -> None:
        self.page.context.close()

    @property
    def median(self) -> float:
        return statistics.median(self.values)
