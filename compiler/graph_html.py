"""Graphs before and after every pass, side by side, on one page that needs nothing else: no network, no script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import zip_longest

from sylvester.compiler.graph_steps import Graphs, Step
from sylvester.compiler.html_page import page

STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 120em; padding: 0 1em; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; font: 12px/1.5 ui-monospace, monospace; }
td { vertical-align: top; width: 50%; padding: 0 .5em; overflow-wrap: anywhere; }
td.gone { background: #d7301f2e; } td.made { background: #2ca0252e; }
tr.gap td { color: #888; text-align: center; padding: .3em; } td:target { outline: 2px solid #e08214; }
summary { cursor: pointer; } a { color: inherit; text-decoration-style: dotted; } h2 { font-size: 1.15em; }
"""
NODE = re.compile(r"%(\w+)")


def render(title: str, steps: Sequence[Step]) -> str:
    """The page; well-formed as XML too. Operands link to the node that makes them."""
    contents = "\n".join(f'<li><a href="#s{i}">{escape(s.name)}</a>: {_summary(s)}</li>' for i, s in enumerate(steps))
    body = "\n".join(_step(i, step) for i, step in enumerate(steps))
    return page(title, STYLE, f"<ol>\n{contents}\n</ol>\n{body}")


def _summary(step: Step) -> str:
    changed = step.changed
    counts = [f"{escape(name)} {_count(step.before, name)} → {_count(step.after, name)} ops" for name in changed]
    return ", ".join(counts) or "nothing changed"


def _count(graphs: Graphs, name: str) -> int:
    """Ops of an entry: its lines but for the signature and what is returned."""
    return max(0, len(graphs.get(name, ())) - 2)


def _step(number: int, step: Step) -> str:
    parts = [f'<h2 id="s{number}">{escape(step.name)}</h2>']
    for entry in step.changed:
        summary = f"<summary>{escape(entry)}: before and after</summary>"
        rows = "\n".join(_rows(f"s{number}-{entry}", step, entry))
        parts.append(f'<details open="">{summary}\n<table>\n{rows}\n</table></details>')
    return "\n".join(parts if step.changed else [*parts, "<p>nothing changed</p>"])


def _rows(place: str, step: Step, entry: str) -> Iterator[str]:
    before, after = step.before.get(entry, ()), step.after.get(entry, ())
    end = 0
    for chunk in step.chunks(entry):
        first, last = chunk[0], chunk[-1]
        if first[1] > end:
            yield _gap(first[1] - end)
        for kind, lo, hi, low, high in chunk:
            yield from _pairs(place, kind == "equal", before[lo:hi], after[low:high])
        end = last[2]
    if len(before) > end:
        yield _gap(len(before) - end)


def _gap(count: int) -> str:
    return f'<tr class="gap"><td colspan="2">{count} lines are the same</td></tr>'


def _pairs(place: str, same: bool, before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    gone, made = ("", "") if same else ("gone", "made")
    for old, new in zip_longest(before, after):
        yield f"<tr>{_cell(f'{place}-b', old, gone)}{_cell(f'{place}-a', new, made)}</tr>"


def _cell(place: str, text: str | None, kind: str) -> str:
    if text is None:
        return "<td></td>"
    made = NODE.match(text.strip())
    name = f' id="{place}-{made[1]}"' if made else ""
    colour = f' class="{kind}"' if kind else ""
    linked = NODE.sub(lambda found: f'<a href="#{place}-{found[1]}">%{found[1]}</a>', escape(text.strip(), quote=False))
    return f"<td{name}{colour}>{linked}</td>"
