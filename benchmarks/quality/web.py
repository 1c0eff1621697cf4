"""Held-out perplexity of the shipped language model in headless Chromium beside the CPU artefact of the same passes.

    python -m benchmarks.quality.web [--passes w4a8] [--windows 8] [--isas simd128 relaxed] [--json out/web.json]

Losses are computed in float64 from the logits of each runtime. "noise" is the standard error of the mean difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from playwright.sync_api import Page, sync_playwright
from torch import Tensor

import sylvester as sv
from benchmarks.quality.recipes import HELD, MODEL, windows
from benchmarks.web.server import running
from sylvester.cli_serve import Server

SCRIPT = """async ([isa, windows]) => {
  const { load } = await import("/model.js");
  const model = await load({ url: "/", isa });
  const losses = [];
  for (const ids of windows) {
    const { logits: { data, shape } } = await model.run({ input_ids: [ids] });
    const width = shape[2];
    ids.slice(1).forEach((next, at) => {
      const row = data.subarray(at * width, (at + 1) * width);
      const top = row.reduce((most, x) => Math.max(most, x), -Infinity);
      losses.push(top + Math.log(row.reduce((total, x) => total + Math.exp(x - top), 0)) - row[next]);
    });
  }
  model.dispose();
  return losses;
}"""


@dataclass(frozen=True)
class Row:
    """Perplexity of one runtime, and how far it is from that of the CPU artefact."""

    passes: str
    runtime: str
    perplexity: float
    change: float
    noise: float
    positions: int

    def __str__(self) -> str:
        return (
            f"{self.passes:8} {self.runtime:20} {self.perplexity:10.4f} {self.change:+9.4%} "
            f"(noise {self.noise:.3%}) {self.positions:6d} positions"
        )


def rows(passes: str, isas: Sequence[str], ids: list[list[int]], page: Page, folder: Path) -> Iterator[Row]:
    recipe: Any = () if passes == "exact" else passes
    with sv.compile(str(MODEL), target="cpu", passes=recipe) as compiled:
        cpu = torch.cat([_losses(compiled(np.array([window])).logits[0], window) for window in ids])
    yield _row(passes, "cpu", cpu, cpu)
    sv.compile(str(MODEL), target="wasm", passes=recipe).save(folder)
    with running(Server(folder, "127.0.0.1", 0, True)) as url:
        page.goto(url + "page/icon.svg")
        for isa in isas:
            losses = torch.tensor(page.evaluate(SCRIPT, [isa, ids]), dtype=torch.float64)
            yield _row(passes, f"chromium, {isa}", losses, cpu)


def _losses(logits: Any, ids: list[int]) -> Tensor:
    return F.cross_entropy(torch.as_tensor(logits[:-1]).double(), torch.tensor(ids[1:]), reduction="none")


def _row(passes: str, runtime: str, losses: Tensor, cpu: Tensor) -> Row:
    differences = losses - cpu
    noise = float(differences.std() / len(losses) ** 0.5)
    change = float(differences.mean().expm1())
    return Row(passes, runtime, float(losses.mean().exp()), change, noise, len(losses))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", default=["exact", "w8a8", "w4a8"])
    parser.add_argument("--isas", nargs="+", default=["simd128", "relaxed"])
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    ids = [sample["input_ids"][0].tolist() for sample in windows(HELD.read_text("utf-8"), options.windows)]
    found = []
    with sync_playwright() as driver, tempfile.TemporaryDirectory(prefix="sylvester-web-quality-") as folder:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(600_000)
        for passes in options.passes:
            for row in rows(passes, options.isas, ids, page, Path(folder, passes)):
                print(row, flush=True)
                found.append(row)
        browser.close()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
