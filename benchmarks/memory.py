"""Resident memory of compiling and of running random linear layers, beside what the report predicted.

    python -m benchmarks.memory [--layers 8] [--inputs 4096] [--outputs 8192] [--passes fp32 w8a8 w4a8]

Each case runs in processes of its own: one compiles, a fresh one without torch loads and runs. `compile` is the peak
while compiling less what was resident before, when the model was there already; `run` the peak of the second process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from sylvester.compiler import knobs

COMPILE = r"""
import json, sys
from pathlib import Path
import torch
from torch import nn
import sylvester as sv
from benchmarks.memory import reset_peak, status

def model(layers, inputs, outputs):
    torch.manual_seed(0)
    sizes = [(inputs, outputs), (outputs, inputs)] * (layers // 2)
    with torch.no_grad():
        return nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes)).eval()

folder, passes, isa, layers, inputs, outputs = sys.argv[1], [p for p in sys.argv[2].split(",") if p], *sys.argv[3:]
layers, inputs, outputs = map(int, (layers, inputs, outputs))
target = sv.Target("cpu", isas=(isa,))
sv.compile(model(2, 64, 64), (torch.randn(2, 64),), target=target, passes=passes).close()
big, x = model(layers, inputs, outputs), torch.randn(2, inputs)
reset_peak()
before = status("VmRSS")
compiled = sv.compile(big, (x,), target=target, passes=passes)
peak = status("VmHWM")
compiled.save(folder)
print(json.dumps({"before": before, "peak": peak, "memory": compiled.report.get("memory", {})}))
"""
RUN = r"""
import json, sys
import numpy as np
import sylvester as sv
from benchmarks.memory import status

loaded = sv.load(sys.argv[1], threads=1)
loaded(np.ones((2, int(sys.argv[2])), np.float32))
assert "torch" not in sys.modules
print(json.dumps(status("VmHWM")))
"""
PASSES = {"fp32": "", "bf16": "bf16", "w8a8": "w8a8", "w4a8": "w4a8"}


def status(key: str) -> int:
    """Bytes of a line of this process's memory status: VmRSS is resident now, VmHWM its highest value."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now; without the right to do so it stays too high."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def compiling(folder: Path, passes: str, isa: str, layers: int, inputs: int, outputs: int) -> dict[str, Any]:
    """Bytes resident before and at the peak, and the predictions of the report; leaves the artefact in `folder`."""
    return dict(_child(COMPILE, str(folder), passes, isa, *map(str, (layers, inputs, outputs))))


def running(folder: Path, inputs: int) -> int:
    """Highest resident bytes of a fresh process that loads the artefact and calls it once."""
    return int(_child(RUN, str(folder), str(inputs)))


def _child(script: str, *arguments: str) -> Any:
    environment = knobs.child_environment(SYLVESTER_REUSE="0", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, isa: str, layers: int, inputs: int, outputs: int) -> dict[str, float]:
    """Megabytes of one case."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "artefact"
        found = compiling(folder, PASSES[name], isa, layers, inputs, outputs)
        ran, stored = running(folder, inputs), (folder / "weights.safetensors").stat().st_size
    told = found["memory"]
    columns = {
        "model": 4 * layers * inputs * outputs,
        "layer": 4 * inputs * outputs,
        "compile": found["peak"] - found["before"],
        "predicted": told.get("compiling", 0),
        "weights": stored,
        "run": ran,
        "predicted run": told.get("running", 0),
    }
    return {key: value / 1e6 for key, value in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--isa", default="avx512")
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=["fp32", "w8a8", "w4a8"])
    given = parser.parse_args()
    for number, name in enumerate(given.passes):
        found = row(name, given.isa, given.layers, given.inputs, given.outputs)
        if not number:
            print(f"{'MB':6}" + "".join(f"{key:>15}" for key in found))
        print(f"{name:6}" + "".join(f"{value:15.1f}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
