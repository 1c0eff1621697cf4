"""Builds small shared libraries from kernel text and calls them with numpy arrays, for the kernel tests."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from sylvester.backends.toolchain import build_shared
from sylvester.codegen import isa as isas
from sylvester.codegen.isa import WASM, Isa
from sylvester.codegen.prelude import prelude
from sylvester.compiler.target import host_architecture
from tests import emulator, webassembly

ELSEWHERE = (emulator.Library, webassembly.Library)
"""What runs code that this machine cannot: each call has a fresh team."""
_FOLDER = tempfile.TemporaryDirectory(prefix="sylvester-kernels-")


@cache
def load(source: str, isa: Isa) -> ctypes.CDLL:
    """The library of `source` for `isa`, built once per test run; one for another architecture is emulated."""
    out = build_shared(prelude(isa) + source, Path(_FOLDER.name, f"{isa.name}-{abs(hash(source)):x}.so"), isa)
    if isa.architecture == WASM:
        return webassembly.Library(out)  # type: ignore[return-value]
    if isa.architecture != host_architecture():
        return emulator.Library(out)  # type: ignore[return-value]
    lib = ctypes.CDLL(str(out))
    lib.sv_team_new.restype = ctypes.c_void_p
    lib.sv_team_free.argtypes = [ctypes.c_void_p]
    lib.sv_team_error_value.restype = ctypes.c_int64
    lib.sv_team_error_value.argtypes = [ctypes.c_void_p]
    return lib


def supported(*formats: str) -> tuple[Isa, ...]:
    """The variants this CPU runs that kernels over these weight formats gain from; the baseline always runs."""
    found = isas.variants(formats, host_architecture())
    baseline = load("", found[0])
    level = baseline.sv_isa_level()
    return tuple(isa for isa in found if isa.level <= level and not (isa.permission and baseline.sv_permit_tiles()))


def export(name: str, body: str, scratch: str = "0") -> str:
    """C text of `run_<name>(team, int64 *i, void **p)`, which runs `body` on the whole team."""
    return f"""
typedef struct {{ const int64_t *i; void **p; }} {name}_call;
static void {name}_body(const sv_thread *t, void *arg)
{{
    {name}_call *call = arg;
    const int64_t *i = call->i;
    void **p = call->p;
    (void)i, (void)p;
    {body}
}}
SV_EXPORT int run_{name}(sv_team *team, const int64_t *i, void **p)
{{
    {name}_call call = {{i, p}};
    return sv_team_run(team, {name}_body, &call, {scratch});
}}
"""


@contextmanager
def team(lib: ctypes.CDLL, threads: int) -> Iterator[ctypes.c_void_p]:
    """A thread team of `lib`, freed at the end; an emulated library makes one for every call."""
    if isinstance(lib, ELSEWHERE):
        yield ctypes.c_void_p(threads)
        return
    made = ctypes.c_void_p(lib.sv_team_new(threads))
    yield made
    lib.sv_team_free(made)


def bind(
    lib: ctypes.CDLL, made: ctypes.c_void_p, name: str, integers: list[int], arrays: list[np.ndarray | None]
) -> Callable[[], int]:
    """A call of `run_<name>` with these arguments; arrays are passed by address and may be strided."""
    if isinstance(lib, ELSEWHERE):
        return lambda: lib.call(f"run_{name}", made.value or 1, integers, arrays)
    numbers = (ctypes.c_int64 * max(1, len(integers)))(*integers)
    pointers = (ctypes.c_void_p * max(1, len(arrays)))(*[None if a is None else a.ctypes.data for a in arrays])
    function = getattr(lib, f"run_{name}")
    return lambda: function(made, numbers, pointers)


def run(
    lib: ctypes.CDLL, made: ctypes.c_void_p, name: str, integers: list[int], arrays: list[np.ndarray | None]
) -> int:
    """Call `run_<name>` once."""
    return bind(lib, made, name, integers, arrays)()


def strides(array: np.ndarray, count: int) -> list[int]:
    """Strides of the leading `count` axes, in elements."""
    return [s // array.itemsize for s in array.strides[:count]]
