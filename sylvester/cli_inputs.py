"""Models and arrays named on the command line."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.compiler.errors import CompileError, InputError
from sylvester.compiler.manifest import TensorSpec

Array = NDArray[Any]


def load_model(text: str) -> tuple[Any, Any]:
    """A path, or what `module:factory` returns: (model, example inputs or None)."""
    if Path(text).exists():
        return text, None
    module, colon, factory = text.partition(":")
    if not colon:
        raise CompileError(f"no model {text!r}", hint="give a Hugging Face folder, a .pt2 file, or module:factory")
    made = _factory(module, factory)()
    if isinstance(made, tuple):
        if len(made) != 2:
            raise CompileError(f"{text} returned {len(made)} values, expected a module or (module, example_inputs)")
        return made
    return made, None


def _factory(module: str, name: str) -> Any:
    """Modules of the working directory can be named, as with `python -m`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CompileError(f"no module {error.name!r}", hint=f"run where {module!r} can be imported") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise CompileError(f"{module!r} has no function {name!r}", hint=f"it has {_functions(found)}")
    return function


def _functions(module: object) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")][:10]


def read_inputs(paths: Sequence[Path], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Arrays by input name: .npz and .json name them, .npy files fill the inputs in order."""
    named: dict[str, Array] = {}
    for path in paths:
        if path.suffix == ".npy":
            free = [spec.name for spec in specs if spec.name not in named]
            if not free:
                raise InputError(f"{path} is one input too many, expected {[s.name for s in specs]}")
            named[free[0]] = _load(path)
        elif path.suffix == ".npz":
            named |= dict(_load(path).items())
        elif path.suffix == ".json":
            named |= _from_json(path, specs)
        else:
            raise InputError(f"cannot read {str(path)!r}, expected a file that ends in .npy, .npz or .json")
    return named


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def read_calibration(path: Path) -> list[Any]:
    """Samples of a file: a text, or arrays in .npy and .safetensors; every row of token ids is a sample."""
    if path.suffix == ".npy":
        return _rows(_load(path))
    if path.suffix == ".safetensors":
        return [row for array in _tensors(path) for row in _rows(array)]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        hint = "give a text in UTF-8, or arrays in a file that ends in .npy or .safetensors"
        raise InputError(f"cannot read {str(path)!r}: {error}", hint=hint) from error


def _rows(array: Array) -> list[Array]:
    return list(array) if array.ndim == 2 and array.dtype.kind in "iu" else [array]


def _tensors(path: Path) -> list[Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return list(load_file(path).values())
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def _from_json(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Nested lists by name, in the dtype the model expects."""
    try:
        data = json.loads(path.read_bytes())
        dtypes = {spec.name: spec.dtype for spec in specs}
        return {name: np.array(value, dtypes.get(name)) for name, value in data.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}", hint='write {"input name": nested lists}') from error


def write_outputs(path: Path, arrays: Mapping[str, Array]) -> None:
    if path.suffix != ".npz":
        raise InputError(f"cannot write {str(path)!r}, expected a name that ends in .npz")
    try:
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise CompileError(f"cannot write {str(path)!r}: {error.strerror}") from error


def summary(name: str, array: Array) -> dict[str, Any]:
    """Shape and range of an output, for people."""
    spread = {"min": float(array.min()), "max": float(array.max()), "mean": float(array.mean())} if array.size else {}
    return {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), **spread}


def named_options(given: list[str]) -> dict[str, object]:
    """name=value texts as options of a target."""
    found: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CompileError(f"an option is {text!r}, expected name=value", hint="--option ops=ort")
        found[name] = value
    return found
