"""What a measured time depends on besides the kernel: this CPU, and the C compiler."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

from sylvester.backends.toolchain import Compiler, version
from sylvester.codegen.isa import Isa
from sylvester.compiler.target import host_architecture

CPU_FACTS = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
DEFAULT_CACHE = 32 << 20


@cache
def cpu() -> str:
    """Model and numbers of the first CPU, and the size of its last-level cache."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    found = " ".join(facts[name] for name in CPU_FACTS if facts.get(name))
    return f"{found or host_architecture()} cache {last_level_cache() >> 20}M"


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((_bytes(size) for size in sizes), default=DEFAULT_CACHE)


def _bytes(size: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits = size.rstrip("KMG")
    return int(digits) * units.get(size[len(digits) :], 1) if digits.isdigit() else 0


def target(isa: Isa) -> str:
    """This CPU and the variant of the code."""
    return f"{cpu()} {isa.name}"


def toolchain(compiler: Compiler, isa: Isa) -> str:
    """Family, version and flags of a compiler; where it is installed does not matter."""
    flags = compiler.arguments(isa)[len(compiler.command) :]
    return f"{compiler.family} {version(compiler)} flags {sha256(' '.join(flags).encode()).hexdigest()[:8]}"
