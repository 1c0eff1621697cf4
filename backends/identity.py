"""What decides a CPU artefact besides program, target and this package: the C compiler and the tuning database."""

from __future__ import annotations

from hashlib import sha256

from sylvester.backends import fingerprint
from sylvester.backends.toolchain import find_compiler, version
from sylvester.backends.tuning_database import default_path
from sylvester.compiler import knobs
from sylvester.compiler.target import Target


def identity(target: Target) -> tuple[str, ...]:
    compiler = find_compiler(architecture=target.architecture)
    return (compiler.family, version(compiler), _measurements(target))


def _measurements(target: Target) -> str:
    """What the tuning database may say, and to whom; empty where there is none, or it is not asked."""
    path = default_path()
    if knobs.TUNE.get() == "0" or not path.exists():
        return ""
    files = [file for file in (path, path.with_name(f"{path.name}-wal")) if file.is_file()]
    sums = [sha256(file.read_bytes()).hexdigest() for file in files]
    return " ".join([fingerprint.cpu(), str(target.threads or knobs.threads()), *sums])
