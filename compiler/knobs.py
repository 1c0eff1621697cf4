"""Every environment switch, with type, default and meaning; nothing else reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sylvester.compiler import cores
from sylvester.compiler.errors import CompileError


@dataclass(frozen=True)
class Knob:
    name: str
    default: str
    meaning: str

    def get(self) -> str:
        return os.environ.get(self.name, self.default)


CC = Knob("SYLVESTER_CC", "", "C compiler command; empty: ziglang, then clang, then gcc")
ISA = Knob("SYLVESTER_ISA", "", "force one CPU variant (scalar, avx2, ..., amx); empty: the best the CPU has")
THREADS = Knob("SYLVESTER_THREADS", "0", "threads of a CPU artefact; 0: all cores this process may use")
HUGE_PAGES = Knob(
    "SYLVESTER_HUGE_PAGES", "1", "0 maps large weights from the file: processes share them, kernels read them slower"
)
CACHE = Knob("SYLVESTER_CACHE", "", "folder of everything kept between runs; empty: ~/.cache/sylvester")
CACHE_SIZE = Knob(
    "SYLVESTER_CACHE_SIZE", "4000", "megabytes of compiled code, models and quantised layers kept for reuse; 0: nothing"
)
REUSE = Knob("SYLVESTER_REUSE", "1", "0 compiles a model anew even if it is kept from an earlier run")
TUNE = Knob("SYLVESTER_TUNE", "1", "0 ignores the tuning database and builds kernels with their defaults")
CHECK = Knob("SYLVESTER_CHECK", "1", "0 skips the numerical check of exact passes")

KNOBS = (CC, ISA, THREADS, HUGE_PAGES, CACHE, CACHE_SIZE, REUSE, TUNE, CHECK)


MOST_THREADS = 1024


def cache_folder() -> Path:
    """The per-user folder of the tuning database, of compiled code and models, and of the C compiler's own cache."""
    return Path(CACHE.get()) if CACHE.get() else Path.home() / ".cache" / "sylvester"


def cache_bytes() -> int:
    """The most that compiled code and models may take up in the cache folder."""
    text = CACHE_SIZE.get()
    if not text.isdecimal():
        raise CompileError(
            f"{CACHE_SIZE.name} must be a number of megabytes, found {text!r}",
            hint=f"unset {CACHE_SIZE.name}, or 0 to keep nothing",
        )
    return int(text) * 1_000_000


def require_threads(count: int) -> None:
    """Refuse a number of threads that no machine can run."""
    if count < 1:
        raise CompileError(f"threads must be at least 1, found {count}")
    if count > MOST_THREADS:
        raise CompileError(f"threads must be at most {MOST_THREADS}, found {count}", hint="use the number of cores")


def threads() -> int:
    """Threads to use: the knob, else the cores this process may keep busy."""
    text = THREADS.get()
    if not text.isdecimal():
        raise CompileError(
            f"{THREADS.name} must be a number of threads, found {text!r}",
            hint=f"unset {THREADS.name}, or 0 for all cores",
        )
    count = int(text) or cores.usable()
    require_threads(count)
    return count


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for a child process, with `extra` on top."""
    return {**os.environ, **extra}


def describe() -> str:
    """One line per knob: name, current value, meaning."""
    return "\n".join(f"{k.name}={k.get()!r:12} {k.meaning}" for k in KNOBS)
