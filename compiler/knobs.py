"""Every environment switch, with type, default and meaning; nothing else reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sylvester.compiler.errors import CompileError


@dataclass(frozen=True)
class Knob:
    name: str
    default: str
    meaning: str

    def get(self) -> str:
        return os.environ.get(self.name, self.default)


CC = Knob("SYLVESTER_CC", "", "C compiler command; empty: ziglang, then clang, then gcc")
ISA = Knob("SYLVESTER_ISA", "", "force one CPU variant (scalar, avx2, avx512); empty: the best the CPU has")
THREADS = Knob("SYLVESTER_THREADS", "0", "threads of a CPU artefact; 0: all cores this process may use")
CACHE = Knob("SYLVESTER_CACHE", "", "folder where the C compiler keeps its own cache; empty: ~/.cache/sylvester")
CHECK = Knob("SYLVESTER_CHECK", "1", "0 skips the numerical check of exact passes")

KNOBS = (CC, ISA, THREADS, CACHE, CHECK)


def cache_folder() -> Path:
    """The per-user folder where the C compiler keeps its own cache."""
    return Path(CACHE.get()) if CACHE.get() else Path.home() / ".cache" / "sylvester"


def threads() -> int:
    """Threads to use: the knob, else the cores this process may run on."""
    text = THREADS.get()
    if not text.isdigit():
        raise CompileError(
            f"{THREADS.name} must be a number of threads, found {text!r}",
            hint=f"unset {THREADS.name}, or 0 for all cores",
        )
    return int(text) or len(os.sched_getaffinity(0))


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for a child process, with `extra` on top."""
    return {**os.environ, **extra}


def describe() -> str:
    """One line per knob: name, current value, meaning."""
    return "\n".join(f"{k.name}={k.get()!r:12} {k.meaning}" for k in KNOBS)
