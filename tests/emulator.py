"""Runs libraries for AArch64 under qemu-user: the calls of tests/kernel_harness.py over pipes to a small C program."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from sylvester.backends.toolchain import GLIBC, find_compiler

SYSROOTS = ("/usr/aarch64-linux-gnu", "/usr/aarch64-unknown-linux-gnu")
"""Where distributions put the C library of AArch64."""
OLD_CPU, NEW_CPU = "cortex-a72", "max"
"""Armv8.0 without dot products; everything the emulator knows."""
NO_SYMBOL = -1000

DRIVER = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
enum { NO_SYMBOL = -1000, MAX = 256 };
typedef struct { int64_t bytes, start, skew; char *base, *at; } span;
static void get(void *to, size_t bytes) { if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0); }
static void put(const void *from, size_t bytes) { if (bytes && fwrite(from, bytes, 1, stdout) != 1) exit(3); }

int main(int argc, char **argv)
{
    void *lib = argc == 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!lib) return fprintf(stderr, "%s\n", dlerror()), 2;
    void *(*team_new)(int) = (void *(*)(int))dlsym(lib, "sv_team_new");
    void (*team_free)(void *) = (void (*)(void *))dlsym(lib, "sv_team_free");
    int64_t (*error_value)(void *) = (int64_t (*)(void *))dlsym(lib, "sv_team_error_value");
    for (;;) {
        char name[64];
        int64_t head[3], integers[MAX], result[2] = {NO_SYMBOL, 0};
        void *pointers[MAX];
        span spans[MAX];
        get(name, sizeof name);
        get(head, sizeof head);
        get(integers, (size_t)head[1] * 8);
        for (int64_t i = 0; i < head[2]; i++) {
            get(&spans[i], 24);
            int64_t room = spans[i].bytes > 0 ? spans[i].bytes : 0;
            spans[i].base = aligned_alloc(64, (size_t)(room + 128) / 64 * 64);
            spans[i].at = spans[i].base + spans[i].skew;
            get(spans[i].at, (size_t)room);
            pointers[i] = spans[i].bytes < 0 ? NULL : spans[i].at + spans[i].start;
        }
        int (*call)(void *, int64_t *, void **) = (int (*)(void *, int64_t *, void **))dlsym(lib, name);
        if (call) {
            void *team = team_new((int)head[0]);
            result[0] = call(team, integers, pointers);
            result[1] = error_value(team);
            team_free(team);
        }
        put(result, sizeof result);
        for (int64_t i = 0; i < head[2]; i++) {
            put(spans[i].at, spans[i].bytes > 0 ? (size_t)spans[i].bytes : 0);
            free(spans[i].base);
        }
        fflush(stdout);
    }
}
"""


def missing() -> str:
    """Why nothing can be emulated here; empty when it can."""
    if shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is not installed: apt-get install qemu-user"
    if _sysroot() is None:
        return f"no C library of AArch64 in {SYSROOTS}: apt-get install libc6-arm64-cross"
    if find_compiler().family != "zig":
        return "only ziglang builds for AArch64 by itself: pip install ziglang"
    return ""


def _sysroot() -> str | None:
    return next((path for path in SYSROOTS if Path(path, "lib").is_dir()), None)


@cache
def _driver() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="sylvester-emulator-")
    source, program = Path(folder.name, "driver.c"), Path(folder.name, "driver")
    source.write_text(DRIVER)
    target = ["-target", f"aarch64-linux-gnu.{GLIBC}", "-O1", "-o", str(program), str(source), "-ldl"]
    subprocess.run([*find_compiler().command, *target], check=True)
    return program, folder


class Library:
    """A shared library for AArch64 in an emulated process, which lives as long as this object."""

    def __init__(self, path: Path, cpu: str = NEW_CPU) -> None:
        command = ["qemu-aarch64", "-cpu", cpu, "-L", str(_sysroot()), str(_driver()[0]), str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.error_value = 0

    def call(self, name: str, threads: int, integers: Sequence[int], arrays: Sequence[np.ndarray | None]) -> int:
        """`name(team, integers, pointers)` in a fresh team; the arrays change as they would in memory of our own."""
        assert self._process.stdin
        assert self._process.stdout
        memory = [_memory(array) for array in arrays]
        parts = [name.encode().ljust(64, b"\0"), struct.pack("<3q", threads, len(integers), len(arrays))]
        parts.append(struct.pack(f"<{len(integers)}q", *integers))
        for found in memory:
            parts += [struct.pack("<3q", *found[1:]), found[0].tobytes()]
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        code, self.error_value = struct.unpack("<2q", self._read(16))
        for array, (span, size, *_) in zip(arrays, memory, strict=True):
            result = np.frombuffer(self._read(max(size, 0)), np.uint8)
            if array is not None and array.flags.writeable:
                span[:] = result
        assert code != NO_SYMBOL, f"no function {name}"
        return int(code)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout
        found = self._process.stdout.read(size)
        assert len(found) == size, f"the emulated process ended with {self._process.wait()}"
        return found

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


def _memory(array: np.ndarray | None) -> tuple[np.ndarray, int, int, int]:
    """The bytes a strided array lies in, their number (-1: NULL), where its first element is, and its alignment."""
    if array is None:
        return np.empty(0, np.uint8), -1, 0, 0
    low, high = np.lib.array_utils.byte_bounds(array)
    start = array.ctypes.data - low if array.size else 0
    size = high - low if array.size else 0
    span = _bytes_at(low, size) if size else np.empty(0, np.uint8)
    return span, size, start, low % 64 if size else 0


def _bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
