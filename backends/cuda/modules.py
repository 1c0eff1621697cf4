"""The text of a kernel as a Python module: for Triton's compiler, or for its interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sylvester.codegen.gpu_kernel import Kernel
from sylvester.compiler.errors import ToolchainMissing

_FOLDER = tempfile.TemporaryDirectory(prefix="sylvester-triton-")


def require_triton() -> Any:
    """Triton, or an error that says how to get it."""
    try:
        import triton
    except ImportError as cause:
        raise ToolchainMissing(
            "kernels for GPUs are built by Triton, which is not installed", hint="pip install 'sylvester[cuda]'"
        ) from cause
    return triton


@cache
def load(text: str, *, interpreted: bool) -> ModuleType:
    """Triton reads the source of its functions from a file, and asks for the interpreter when they are defined."""
    triton = require_triton()
    name = f"sv_{sha256(text.encode()).hexdigest()[:16]}_{'interpreted' if interpreted else 'compiled'}"
    path = Path(_FOLDER.name, f"{name}.py")
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    scope: AbstractContextManager[object] = triton.knobs.runtime.scope()
    with scope:
        triton.knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module


def interpret(kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Runs a kernel on tensors of the CPU, one program after another: slow, and numbers as on a GPU but for their order
    in sums and the rounding of its own instructions."""
    function: Callable[..., Any] = getattr(load(kernel.text, interpreted=True), kernel.function)[grid]
    with np.errstate(all="ignore"):
        function(**arguments, **kernel.constants, num_warps=kernel.warps, num_stages=kernel.stages)
