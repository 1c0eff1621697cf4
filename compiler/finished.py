"""Rounded weights on disk as soon as each is finished, so that an interrupted run goes on where it was.

A key is a chain: it holds what decided every weight before, because later layers are fitted to what earlier ones give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sylvester.compiler import knobs
from sylvester.compiler.calibration import Sample
from sylvester.compiler.compile_cache import own_code
from sylvester.compiler.store import store

KIND = "layers"
FILE = "layer.safetensors"


class Finished:
    """`about` is all that decides the result besides the weights; without room or with reuse off nothing is kept."""

    def __init__(self, about: Iterable[str]) -> None:
        self._store = store(KIND)
        self.on = bool(self._store.limit) and knobs.REUSE.get() != "0"
        self._chain = _digest(own_code(), torch.__version__, *about) if self.on else ""
        self.reused = 0

    def advance(self, *about: str, weight: Tensor) -> None:
        """Go on to the next weight; `find` and `keep` are about this one."""
        if self.on:
            self._chain = _digest(self._chain, *about, tensor_sum(weight))

    def find(self) -> tuple[Tensor, ...] | None:
        """What an earlier run made of the weight; a damaged file is forgotten."""
        folder = self._store.find(self._chain) if self.on else None
        if folder is None:
            return None
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                found = tuple(file.get_tensor(str(i)).clone() for i in range(len(file.keys())))
        except (OSError, SafetensorError):
            self._store.drop(self._chain)
            return None
        self.reused += 1
        return found

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """A cache folder that cannot be written is no reason to fail."""
        if not self.on:
            return
        with suppress(OSError, SafetensorError):
            made = self._store.workplace()
            save_file({str(i): t.contiguous() for i, t in enumerate(tensors)}, made / FILE)
            self._store.keep(self._chain, made)


def tensor_sum(tensor: Tensor) -> str:
    """A digest of type, shape and content."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype}{list(tensor.shape)} {hashlib.sha256(flat.numpy().data).hexdigest()}"


def samples_sum(samples: Iterable[Sample]) -> str:
    """A digest of calibration data."""
    return _digest(*(f"{name} {tensor_sum(sample[name])}" for sample in samples for name in sorted(sample)))


def _digest(*parts: str) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part.encode())
    return found.hexdigest()
