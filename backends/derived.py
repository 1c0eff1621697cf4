"""Tensors of an artefact that no file holds: sums of atoms, made when it is loaded; on numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.memory import aligned
from sylvester.backends.tensor_file import TensorFile
from sylvester.codegen.panels import pack_f32
from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.manifest import WEIGHTS, DerivedSpec, Manifest, SumSpec

Array = NDArray[np.generic]


def open_weights(folder: Path, manifest: Manifest) -> TensorFile | None:
    """The file of weights, which has all that are needed; None where none is."""
    used = stored_names(manifest)
    if not used:
        return None
    file = TensorFile(folder / WEIGHTS)
    if missing := sorted(used - set(file.arrays)):
        raise ArtefactError(
            f"{WEIGHTS} in {str(folder)!r} has no tensor {missing[0]!r}", hint="compile the model again"
        )
    return file


def stored_names(manifest: Manifest) -> set[str]:
    """The tensors that the file of weights must have."""
    used = {name for entry in manifest.entries.values() for name in entry.weights}
    sources = {name for spec in manifest.derived.values() for part in spec.parts for name in sources_of(part)}
    return (used - set(manifest.derived)) | sources


def sources_of(part: SumSpec) -> list[str]:
    """The stored tensors that a weight is made of."""
    return [name for name in (part.weight, part.atoms, part.coefficients, part.left, part.right) if name]


def with_derived(manifest: Manifest, stored: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors that entries read: stored ones, and those that are made of stored ones."""
    read = {name for entry in manifest.entries.values() for name in entry.weights}
    made = {name: derive(spec, stored) for name, spec in manifest.derived.items()}
    return {name: array for name, array in stored.items() if name in read} | made


def derive(spec: DerivedSpec, stored: Mapping[str, Array]) -> Array:
    """Weights in float32: one as it is, or all in panels of 32 rows."""
    weights = [_sum(part, stored) for part in spec.parts]
    if not spec.panels:
        return aligned(weights[0])
    if spec.ways == 1:
        return aligned(pack_f32(np.concatenate(weights)))
    turns = np.stack([pack_f32(weight) for weight in weights], 1)
    return aligned(turns.reshape(-1, *turns.shape[2:]))


def _sum(part: SumSpec, stored: Mapping[str, Array]) -> NDArray[Any]:
    if part.weight:
        return stored[part.weight]
    atoms, coefficients, *factors = (stored[name].view(np.float32) for name in sources_of(part))
    total: NDArray[Any] = np.tensordot(coefficients, atoms, 1)
    return total + factors[0] @ factors[1] if factors else total
