"""Memory of quantising a mapped model: what comes out, and little more than a block of what goes in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sylvester as sv
from sylvester.compiler import knobs

BLOCKS = 8
ROOM = 6 << 20
SCRIPT = r"""
import json, sys, threading
from pathlib import Path
import torch
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.gptq import Hessian, round_gptq
from sylvester.compiler.program import Program
from sylvester.compiler.quantization import widest
from sylvester.passes.quantize import Quantize

def warm_up():
    "Libraries allocate buffers of their own when they are first called."
    hessian = Hessian(1024)
    hessian.add(torch.randn(300, 1024))
    round_gptq(torch.randn(384, 1024), hessian.prepared(), 4, 32, widest)

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])

program = Program.load(sys.argv[1])
model = program.weights.nbytes
program.calibration = Calibration(tuple({"input_ids": row} for row in torch.randint(256, (4, 1, 64))))
warm_up()
before, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], resident())

watcher = threading.Thread(target=watch)
watcher.start()
Quantize(4, method=sys.argv[2]).run(program)
program.sweep()
done.set()
watcher.join()
print(json.dumps({"model": model, "made": program.weights.nbytes, "grown": peak[0] - before}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program, whose weights stay mapped when it is loaded."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=384, intermediate_size=1024, num_hidden_layers=BLOCKS, num_attention_heads=6,
        max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("memory") / "program"
    sv.trace(LlamaForCausalLM(config).eval(), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}).save(path)
    return path


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_what_is_held_while_quantising(method: str, folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), method]
    # Freed memory goes back to the system at once, so that resident is what is held.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "100000"}
    environment = knobs.child_environment(SYLVESTER_REUSE="0", OMP_NUM_THREADS="1", **allocator)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr

    found = json.loads(done.stdout.splitlines()[-1])

    block = found["model"] / BLOCKS
    assert found["made"] < found["model"] / 4
    assert found["made"] < found["grown"] < found["made"] + 4 * block + ROOM < found["model"]
