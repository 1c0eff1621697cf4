"""The program itself, run op by op in plain PyTorch: what every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sylvester.backends.base import Backend
from sylvester.backends.signature import manifest as signature
from sylvester.compiler import binding, serialize
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.parallel_ops import require_ranks
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress
from sylvester.compiler.runner import State, entry_of
from sylvester.compiler.stages import DRAFT
from sylvester.compiler.target import Target

Array = NDArray[np.generic]
PROGRAM = "program"
UNVERIFIED = "generation drafts nothing: PyTorch rounds tokens that come together otherwise than single ones"


class Reference(Backend):
    name: ClassVar[str] = "reference"

    def build(self, program: Program, target: Target, folder: Path, progress: Progress) -> Manifest:
        serialize.save(program, folder / PROGRAM)
        self.notes = (UNVERIFIED,) if DRAFT in program.info else ()
        return signature(program, target)


class ReferenceRunner:
    """Runs a saved program; bfloat16 comes and goes as uint16."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.program = serialize.load(folder / PROGRAM)

    def new_state(self, entry: str, inputs: Mapping[str, Array]) -> State:
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        arrays = binding.complete(spec, inputs, State({}))
        values = binding.bind(spec, arrays, None, self.manifest.state)
        shapes = binding.state_shapes(spec, self.manifest.state, values)
        return State(
            {name: np.zeros(shape, _numpy_dtype(self.manifest.state[name].dtype)) for name, shape in shapes.items()}
        )

    def run(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        require_ranks(self.program.info)
        state = state if spec.states else None
        arrays = binding.complete(spec, inputs, state)
        binding.bind(spec, arrays, state, self.manifest.state)
        tensors = {s.name: _tensor(a, s.dtype) for s, a in zip(spec.inputs, arrays, strict=True)}
        slots = {n: _tensor(a, self.manifest.state[n].dtype) for n, a in state.arrays.items()} if state else {}
        results = self.program.run(entry, tensors, slots)
        for name in spec.states:
            state.arrays[name][...] = _array(results[name])  # type: ignore[union-attr]
        return {output.name: _array(results[output.name]) for output in spec.outputs}

    def close(self) -> None:
        return None


def _numpy_dtype(name: str) -> str:
    return binding.DTYPES.get(name, name)


def _tensor(array: Array, dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    return np.array((tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy())


def load(folder: Path, manifest: Manifest, threads: int | None = None) -> ReferenceRunner:
    return ReferenceRunner(folder, manifest)
