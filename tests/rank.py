"""One process of a tensor-parallel run: python -m tests.rank FOLDER RANK WORLD MODEL...

Reads a prompt and decodes a few tokens more over the caches; keeps the logits of both in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from sylvester.backends.cuda.emulated import Emulated
from sylvester.backends.cuda.runtime import GpuRunner
from sylvester.compiler.artefact import open_runner
from sylvester.compiler.manifest import read

KEPT = 7
"""Tokens of the prompt; the others are decoded together."""
IDS = (np.arange(22) * 37 % 190 + 3).reshape(2, 11)


def run(folder: Path) -> dict[str, np.ndarray]:
    """Logits of the prompt and of the tokens after it, by the runner of an artefact; of a GPU on an emulated one."""
    made = read(folder)
    runner = GpuRunner(folder, made, Emulated()) if made.target == "cuda" else open_runner(folder)
    prompt, rest = {"input_ids": IDS[:, :KEPT]}, {"input_ids": IDS[:, KEPT:]}
    state = runner.new_state("prefill", prompt)
    first = runner.run("prefill", prompt, state)["logits"]
    state.position = KEPT
    return {"prefill": first, "decode": runner.run("decode", rest, state)["logits"]}


def main(folder: Path, rank: int, world: int, models: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for name in models:
        np.savez(folder / f"{name}-{rank}.npz", **run(folder / f"{name}-{rank}"))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
