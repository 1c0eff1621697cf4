"""What decides a CPU artefact besides program, target and this package: the C compiler and the tuning database."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from sylvester.backends import fingerprint, tvm_engine
from sylvester.backends.toolchain import find_compiler, version
from sylvester.backends.tuning_database import default_path
from sylvester.compiler import knobs
from sylvester.compiler.target import Target


def identity(target: Target) -> tuple[str, ...]:
    compiler = find_compiler(architecture=target.architecture)
    engines = [f"{name} {tvm_engine.version()}" for name in target.engines]
    return (compiler.family, version(compiler), _measurements(target), *engines)


def _measurements(target: Target) -> str:
    """What the tuning database may say, and to whom; empty where there is none, or it is not asked."""
    known = measurements()
    return " ".join([fingerprint.cpu(), str(target.threads or knobs.threads()), known]) if known else ""


def measurements() -> str:
    """The contents of the tuning database; empty where there is none, or it is not asked."""
    path = default_path()
    if knobs.TUNE.get() == "0" or not path.exists():
        return ""
    return " ".join(_sum(file) for file in (path, path.with_name(f"{path.name}-wal")))


def _sum(file: Path) -> str:
    """Empty for a file that is not there, as after the last of several processes closed the database, or unreadable."""
    try:
        return sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
