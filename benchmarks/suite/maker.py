"""Which engines there are, what they need, and the task that each is built for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Engine
from benchmarks.suite.works import Work

ALL = ("decode", "prefill", "encode")


@dataclass(frozen=True)
class Task:
    """A work at one precision, the folder of the models and the number of threads."""

    work: Work
    precision: str
    models: Path
    threads: int

    @property
    def checkpoint(self) -> Any:
        from benchmarks.suite.shapes import Checkpoint

        return Checkpoint(self.work.shape, self.models)

    def checkpoint_module(self, dtype: Any) -> Any:
        if self.work.kind == "zoo":
            from benchmarks.suite.vision import case

            return case(self.work.shape).model.to(dtype)
        return self.checkpoint.load(dtype)


@dataclass(frozen=True)
class Maker:
    """`build` is the place of a function Task -> Engine in this package."""

    name: str
    build: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    kinds: tuple[str, ...] = ALL

    def takes(self, work: Work, precision: str) -> bool:
        return work.kind in self.kinds and precision in self.precisions

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def __call__(self, task: Task) -> Engine:
        module, function = self.build.split(":")
        build: Callable[[Task], Engine] = getattr(importlib.import_module(f"benchmarks.suite.{module}"), function)
        return build(task)


MAKERS = (
    Maker("sylvester", "sylvester_engine:build", ("sylvester",), ("fp32", "bf16", "int8", "int4"), (*ALL, "zoo")),
    Maker("torch", "torch_engines:eager", ("torch",), ("fp32", "bf16"), (*ALL, "zoo")),
    Maker("torch.compile", "torch_engines:compiled", ("torch",), ("fp32", "bf16"), (*ALL, "zoo")),
    Maker("torch.compile freezing", "torch_engines:frozen", ("torch",), ("fp32", "bf16")),
    Maker("torchao", "torch_engines:quantized", ("torchao",), ("int8", "int4")),
    Maker("onnxruntime", "onnx_engine:build", ("onnxruntime", "onnx"), ("fp32", "int8", "int4")),
    Maker("openvino", "openvino_engine:build", ("openvino", "nncf"), ("fp32", "bf16", "int8", "int4")),
    Maker("llama.cpp", "llama_cpp_engine:build", ("llama_cpp", "gguf"), ("fp32", "bf16", "int8", "int4"), ALL[:2]),
)


def plan(work: Work, engines: tuple[str, ...]) -> list[tuple[Maker, str]]:
    """Every engine of the given names (none: all) at every precision of the work that it has."""
    makers = [maker for maker in MAKERS if not engines or maker.name.split()[0] in engines or maker.name in engines]
    return [(maker, p) for p in work.precisions for maker in makers if maker.takes(work, p)]
