"""One model for every engine from the same weights: bundles of this compiler, ONNX files and GGUF files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sylvester as sv
from benchmarks.suite import gguf_llama, onnx_bert, onnx_llama
from benchmarks.suite.cache import cached
from benchmarks.suite.shapes import Checkpoint, token_ids
from benchmarks.suite.sizes import SEQUENCE
from benchmarks.suite.sylvester_engine import RECIPES
from benchmarks.web.sources import ASCII, checkpoint
from benchmarks.web.works import PageWork

ISAS = ("relaxed", "relaxed-threads")


@dataclass(frozen=True)
class Model:
    """What one engine opens: the name of its page, a file or folder of `models`, and the options of `open`."""

    engine: str
    precision: str
    path: Path
    options: dict[str, Any]

    @property
    def url(self) -> str:
        """A bundle is a folder."""
        return f"/bundles/{self.path.name}/" if self.engine == "sylvester" else f"/models/{self.path.name}"


def made(work: PageWork, models: Path, bundles: Path) -> Iterator[Model]:
    """Every engine at every precision of the work, each file written where it is not there."""
    source = checkpoint(work.shape, models)
    encoder = work.kind == "encode"
    for precision in work.precisions:
        yield Model("sylvester", precision, bundle(source, precision, bundles), {})
        onnx = source.file(f"{precision}.onnx")
        cached(onnx, onnx_bert.write if encoder else onnx_llama.write, source, precision)
        yield Model("onnxruntime", precision, onnx, {} if encoder else caches(source))
        if not encoder:
            gguf = cached(source.file(f"ascii-{precision}.gguf"), gguf_llama.write, source, precision, ASCII)
            yield Model("wllama", precision, gguf, {"exact": precision == "fp32"})


def caches(source: Checkpoint) -> dict[str, int]:
    config = source.config
    width = config.hidden_size // config.num_attention_heads
    return {"layers": config.num_hidden_layers, "heads": config.num_key_value_heads, "width": width}


def bundle(source: Checkpoint, precision: str, folder: Path) -> Path:
    return cached(folder / f"{source.shape}-{precision}-web", write_bundle, source, precision)


def write_bundle(folder: Path, source: Checkpoint, precision: str) -> None:
    target, passes = sv.Target("wasm", isas=ISAS), RECIPES[precision]
    if source.shape == "B":
        ids = token_ids("B", 1, SEQUENCE)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        compiled = sv.compile(source.load(), inputs, target=target, passes=passes)
    else:
        compiled = sv.compile(source.folder, target=target, passes=passes)
    compiled.save(folder)
