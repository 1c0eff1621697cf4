"""Weights in files small enough to fetch, store and check one by one, named after what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np

from sylvester.backends.tensor_writer import ALIGNMENT, Deferred

SHARD = 16 << 20
"""Bytes of a shard; the last one may have fewer."""
NAME = "weights.json"


def write_shards(folder: Path, tensors: Mapping[str, Deferred], shard: int = SHARD) -> None:
    """`weights/<hash>.bin` and `weights.json`: where each tensor lies in the shards end to end, and their hashes."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    places, offset = {}, 0
    for name, tensor in tensors.items():
        places[name] = {"offset": offset, "bytes": tensor.nbytes}
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    shards = [write_shard(folder, part) for part in _cut(_pieces(tensors), shard)]
    index = {"bytes": offset, "shards": shards, "tensors": places}
    (folder / NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _pieces(tensors: Mapping[str, Deferred]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        made = tensor.make()
        for piece in [made] if isinstance(made, np.ndarray) else made:
            yield memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        yield memoryview(bytes(-tensor.nbytes % ALIGNMENT))


def _cut(pieces: Iterator[memoryview], size: int) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        while len(piece):
            taken, piece = piece[: size - len(held)], piece[size - len(held) :]
            held += taken
            if len(held) == size:
                yield bytes(held)
                held.clear()
    if held:
        yield bytes(held)


def write_shard(folder: Path, data: bytes) -> dict[str, object]:
    """What the index says of the file that now holds `data`."""
    digest = sha256(data).hexdigest()
    file = f"weights/{digest[:32]}.bin"
    (folder / file).write_bytes(data)
    return {"file": file, "bytes": len(data), "sha256": digest}
