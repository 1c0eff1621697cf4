"""A digest of a model: its weights, attributes and the code it runs, found by walking objects, never by their names.

What cannot be followed is refused: a model that looks the same must be the same.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Mapping, Sequence, Set
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), slice, range)
BY_REPR = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, np.dtype, np.generic)
BUILT_IN = (types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType)
NOT_CODE = {"__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"}
NOT_CODE |= {"__annotations__", "__annotate__", "__annotate_func__", "__abstractmethods__", "_abc_impl"}
OWN = "sylvester"
"""This package's code is left to the caller, as it may change without its version."""
SALTED = {"_original_object_hash"}
"""transformers keeps `hash()` of some attributes beside them: another number in every process."""


class Opaque(Exception):
    """Something that has no digest; the text says what."""


class Digest:
    """Feed values, read `hex()`. An object met again is recorded by its number, so that sharing and cycles count."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self._memory: dict[int, int] = {}
        self._modules: set[tuple[str, Sequence[str]]] = set()

    def hex(self) -> str:
        return self._hash.hexdigest()

    def text(self, *parts: str) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def add(self, value: Any) -> None:
        """Anything reachable from a model; `Opaque` where it cannot be followed."""
        if isinstance(value, (*PLAIN, *BY_REPR)) and not isinstance(value, enum.Enum):
            self.text(type(value).__qualname__, repr(value))
        elif self._is_new(value):
            self._add_object(value)

    def _is_new(self, value: Any) -> bool:
        number = self._seen.setdefault(id(value), len(self._seen))
        if number < len(self._alive):
            self.text("again", str(number))
            return False
        self._alive.append(value)
        return True

    def _add_object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray):
            self._add_array(value)
        elif isinstance(value, types.ModuleType):
            self._add_module(value, ())
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, BUILT_IN):
            self.text("built-in", repr(getattr(value, "__module__", "")), value.__qualname__)
        elif isinstance(value, (Mapping, Sequence, Set)) and type(value).__module__ in ("builtins", "collections"):
            self._add_collection(value)
        else:
            self._add_instance(value)

    def _add_collection(self, value: Any) -> None:
        self.text(type(value).__qualname__, str(len(value)))
        self.add(getattr(value, "default_factory", None))
        if isinstance(value, Mapping):
            value = [part for item in value.items() for part in item]
        elif isinstance(value, Set):
            value = sorted(value, key=repr)
        for part in value:
            self.add(part)

    def _add_tensor(self, value: Tensor) -> None:
        array = value.detach()
        if array.layout != torch.strided or array.is_meta or array.is_quantized:
            raise Opaque(f"a tensor of type {array.dtype} and layout {array.layout} on {array.device}")
        self.text("tensor", str(array.dtype), str(tuple(array.shape)), str(array.stride()), type(value).__qualname__)
        self.text(str(value.device), str(self._memory.setdefault(value.data_ptr(), len(self._memory))))
        flat = array.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        self._hash.update(flat.view(torch.uint8).numpy().data)

    def _add_array(self, value: np.ndarray[Any, Any]) -> None:
        if value.dtype.hasobject:
            raise Opaque("an array of objects")
        self.text("array", str(value.dtype), str(value.shape), str(value.strides))
        self._hash.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _add_instance(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.text("enum", type(value).__qualname__, value.name)
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.add((value.__func__, value.__self__))
        elif isinstance(value, (staticmethod, classmethod)):
            self.add(value.__func__)
        elif isinstance(value, property):
            self.add((value.fget, value.fset))
        else:
            self._add_attributes(value)

    def _add_attributes(self, value: Any) -> None:
        bases = type(value).__mro__[:-1]
        if not all(_shows_all(base) for base in bases):
            raise Opaque(f"a value of type {type(value).__module__}.{type(value).__qualname__}")
        self.add(type(value))
        slots = [name for base in bases for name in vars(base).get("__slots__", ()) if hasattr(value, name)]
        self.add({name: getattr(value, name) for name in slots})
        attributes = vars(value) if hasattr(value, "__dict__") else {}
        self.add({name: part for name, part in attributes.items() if name not in SALTED})
        if isinstance(value, dict):
            self.add(dict(value))

    def _add_class(self, value: type) -> None:
        self.text("class", value.__module__, value.__qualname__)
        release = _release(value.__module__)
        if release:
            self.text(release)
            self.add([part for part in vars(value).values() if _is_patch(part)])
            self._add_patches(sys.modules.get(value.__module__))
            return
        self.add(value.__bases__)
        self.add({name: part for name, part in vars(value).items() if name not in NOT_CODE})

    def _add_patches(self, module: types.ModuleType | None) -> None:
        """Functions that were put into a library's module, or into one that it names, from elsewhere."""
        named = [part for part in vars(module).values() if isinstance(part, types.ModuleType)] if module else []
        for space in filter(None, [module, *named]):
            if (space.__name__, "patches") not in self._modules:
                self._modules.add((space.__name__, "patches"))
                self.add({name: part for name, part in vars(space).items() if _is_patch(part)})

    def _add_function(self, value: types.FunctionType) -> None:
        self.text("function", value.__module__ or "", value.__qualname__)
        release = "" if _is_patch(value) else _release(value.__module__ or "")
        self.text(release)
        for cell in value.__closure__ or ():
            self.add(_contents(cell))
        if not release:
            self.add((value.__defaults__, value.__kwdefaults__, vars(value)))
            self._add_code(value.__code__, value.__globals__)

    def _add_code(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        self._hash.update(code.co_code)
        self.text(*code.co_names, *code.co_varnames, *code.co_freevars, str(code.co_flags))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant, scope)
            else:
                self.add(constant)
        for name in code.co_names:
            found = scope.get(name)
            if isinstance(found, types.ModuleType):
                self._add_module(found, code.co_names)
            elif name in scope:
                self.add(found)
        if not {"environ", "getenv"}.isdisjoint(code.co_names):
            raise Opaque("a function that reads the environment")
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME" and not _release(str(step.argval)):
                raise Opaque(f"an import of {step.argval!r} inside a function")

    def _add_module(self, value: types.ModuleType, names: Sequence[str]) -> None:
        """An installed package by its version; any other module by its text and what the reader names of it."""
        self.text("module", value.__name__)
        if (value.__name__, names) in self._modules:
            return
        self._modules.add((value.__name__, names))
        release = _release(value.__name__)
        if release:
            self.text(release)
            return
        path = getattr(value, "__file__", None)
        if not path or not Path(path).is_file():
            raise Opaque(f"the module {value.__name__!r}")
        self._hash.update(Path(path).read_bytes())
        for name in names:
            part = getattr(value, name, None)
            if isinstance(part, types.ModuleType):
                self._add_module(part, names)
            elif hasattr(value, name):
                self.add(part)


def _shows_all(base: type) -> bool:
    """Whether instances hold nothing but attributes (and the items of a dict); classes made in C may hold more."""
    return base is dict or any({"__dict__", "__slots__"} & vars(made).keys() for made in base.__mro__[:-1])


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


@functools.cache
def _release(module: str) -> str:
    """What fixes the code of an installed module: its distribution's version. Empty for code that may be edited."""
    top = module.partition(".")[0]
    if top == OWN:
        return OWN
    if top in sys.stdlib_module_names or top == "builtins":
        return "" if top == "__main__" else f"python {sys.version}"
    path = getattr(sys.modules.get(top), "__file__", None)
    if not path or not _is_installed(path):
        return ""
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _is_installed(path: str) -> bool:
    folders = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    folders += [own for name in list(sys.modules) if name.startswith(f"{OWN}.") for own in _folders(name)]
    return any(Path(path).is_relative_to(folder) for folder in folders) or path.startswith("<")


def _folders(package: str) -> list[str]:
    return list(getattr(sys.modules[package], "__path__", ()))


def _is_patch(part: object) -> bool:
    """Whether this is a function written elsewhere than in an installed package, whatever it says of itself."""
    return isinstance(part, types.FunctionType) and not _is_installed(part.__code__.co_filename)
