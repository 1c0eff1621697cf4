"""One work: open every engine, check that it computes the model, and measure all of them in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error

from benchmarks.measure import Row
from benchmarks.web import checks
from benchmarks.web.browser import Tab
from benchmarks.web.limits import Probe
from benchmarks.web.models import Model
from benchmarks.web.sources import CHECKED, given
from benchmarks.web.works import PageWork
from sylvester.backends.limits import Limits


@dataclass
class Measured:
    """Rows in the order of the engines, the limits of the page meanwhile, and what the engines say of themselves."""

    rows: list[Row] = field(default_factory=list)
    limits: Limits | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def measure(work: PageWork, models: Sequence[Model], browser: Browser, site: str, folder: Path, runs: int) -> Measured:
    """`folder` holds what `checks` needs; rows of engines that fail say why."""
    asked = given(work)
    expected = checks.reference(work, asked["ids"], folder)
    found, tabs = Measured(), []
    probe = Probe.open(browser, site, work)
    for model in models:
        row, tab, facts = opened(work, model, browser, site, asked, expected)
        found.facts[f"{model.engine} {model.precision}"] = facts
        found.rows.append(row)
        tabs.append(tab)
    for _ in range(runs):
        probe.block()
        for tab in filter(None, tabs):
            tab.block(work.kind, asked)
    found.rows = [timed(row, tab) for row, tab in zip(found.rows, tabs, strict=True)]
    found.limits = probe.limits(browser.version)
    for tab in filter(None, [*tabs, probe.tab]):
        tab.close()
    return found


def opened(
    work: PageWork, model: Model, browser: Browser, site: str, asked: dict[str, Any], expected: checks.Reference
) -> tuple[Row, Tab | None, dict[str, Any]]:
    """The engine in a page, with its error; no page for one that fails."""
    tab = None
    try:
        tab = Tab.open(browser, site, model.engine, {**model.options, "url": model.url, "threads": work.threads})
        answer = tab.check("hidden" if work.kind == "encode" else "tokens", {**asked, "steps": CHECKED})
    except Error as failure:
        if tab:
            tab.close()
        return Row(work.name, model.engine, model.precision, failure=" ".join(str(failure).split())[:300]), None, {}
    error, tokens = checks.difference(answer, expected), checks.agreeing(answer, expected)
    wrong = checks.problem(model.precision, error, tokens, expected)
    facts = tab.facts | ({"tokens as PyTorch": tokens} if expected.tokens else {})
    if wrong:
        tab.close()
    row = Row(work.name, model.engine, model.precision, error=error, failure=wrong)
    return row, None if wrong else tab, facts


def timed(row: Row, tab: Tab | None) -> Row:
    if tab is None:
        return row
    return Row(row.work, row.engine, row.precision, tab.median, min(tab.values), row.error)
