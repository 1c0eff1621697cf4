"""The text of a kernel as a Python module: for Triton's compiler, or for its interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sylvester.backends.cuda.interpreter import rounding
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
    name = f"sv_{sha256(text.encode()).hexdigest()[:16]}_{'interpreted' if interpreted else 'compiled'}"
    path = Path(_FOLDER.name, f"{name}.py")
    path.write_text(text, encoding="utf-8")
    return _module(name, path, interpreted=interpreted)


def _module(name: str, path: Path, *, interpreted: bool) -> ModuleType:
    triton = require_triton()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module


def interpret(kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Runs a kernel on tensors of the CPU, one program after another: slow, and numbers as on a GPU but for their order
    in sums and the rounding of its own instructions."""
    function: Callable[..., Any] = getattr(load(kernel.text, interpreted=True), kernel.function)[grid]
    with np.errstate(all="ignore"), _interpreted_language(), _prepared_once(), rounding():
        function(**arguments, **kernel.constants, num_warps=kernel.warps, num_stages=kernel.stages)


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Triton's language as its interpreter needs it, and as its compiler needs it again afterwards.

    What the language defines by functions of its own, such as `tl.sum`, is taken in interpreted form, and so are those
    that it reduces by, which the interpreter knows and does at once; calls between interpreted functions leave changes
    behind.
    """
    language = require_triton().language
    core, standard = language.core, language.standard
    classes = (core.tensor, core.tensor_descriptor_base, core.dtype, core.condition)
    places = (language, standard, core, language.math, *classes)
    before = [dict(vars(place)) for place in places]
    try:
        for name, function in _standard().items():
            setattr(standard if name.startswith("_") else language, name, function)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a maximum over NaN alone
            yield
    finally:
        for place, values in zip(places, before, strict=True):
            _restore(place, values)


@contextmanager
def _prepared_once() -> Iterator[None]:
    """Triton prepares its language anew for every call of a function by another; within a launch, once is enough.

    It also computes whether sums overflow, and does nothing with the answer.
    """
    from triton.runtime import interpreter

    plain, done = interpreter._patch_lang, dict[tuple[int, ...], Any]()
    builder, options = interpreter.interpreter_builder, interpreter.interpreter_builder.options

    def prepare(function: Any) -> Any:
        key = tuple(id(value) for value in function.__globals__.values() if isinstance(value, ModuleType))
        if key not in done:
            done[key] = plain(function)
        return done[key]

    interpreter._patch_lang = prepare
    builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang = plain
        builder.options = options


def _restore(place: Any, values: Mapping[str, Any]) -> None:
    for name, value in list(vars(place).items()):
        if name not in values:
            delattr(place, name)
        elif values[name] is not value:
            setattr(place, name, values[name])


@cache
def _standard() -> Mapping[str, Any]:
    triton = require_triton()
    path = Path(triton.language.standard.__file__)
    module = _module("triton.language.interpreted", path, interpreted=True)
    language = triton.language
    wanted = {**vars(language), **{n: f for n, f in vars(language.standard).items() if n.startswith("_")}}
    functions = {name for name, value in wanted.items() if isinstance(value, triton.JITFunction)}
    return {name: getattr(module, name) for name in functions if hasattr(module, name)}
