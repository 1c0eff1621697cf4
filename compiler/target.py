"""What a pass or a lowering needs to know of the machine a program is compiled for."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sylvester.compiler.errors import CompileError
from sylvester.compiler.knobs import require_threads

BUILT_IN = ("cpu", "cuda", "onnx", "reference", "null", "wasm")
ENGINES = ("tvm",)


@dataclass(frozen=True)
class Target:
    """A backend name and its options.

    `isas` empty: every variant that pays; `threads` 0: chosen at load; `arch` empty: the architecture of this machine;
    `tune`: seconds for timing kernels, None to use what is known. `engines`: other compilers that may build parts of
    the code where they are measured to be faster: "tvm".
    """

    name: str = "cpu"
    threads: int = 0
    isas: tuple[str, ...] = ()
    max_length: int = 0
    arch: str = ""
    tune: float | None = None
    engines: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    """What one backend alone takes, by name."""

    def __post_init__(self) -> None:
        if self.engines not in ((), *((name,) for name in ENGINES)):
            raise CompileError(f"engines must be a tuple of at most one of {list(ENGINES)}, found {self.engines!r}")

    @property
    def architecture(self) -> str:
        """The architecture native code is built for, as `x86_64` or `aarch64`."""
        return self.arch or host_architecture()

    @staticmethod
    def parse(target: Target | str, *, threads: int | None = None, tune: float | None = None) -> Target:
        chosen = target if isinstance(target, Target) else Target(target)
        if threads is not None or chosen.threads:
            require_threads(chosen.threads if threads is None else threads)
        chosen = chosen if tune is None else replace(chosen, tune=float(tune))
        if chosen.tune is not None and not chosen.tune > 0:
            raise CompileError(f"tune must be a number of seconds above 0, found {chosen.tune}")
        return replace(chosen, threads=threads) if threads is not None else chosen


def require_options(target: Target, known: Sequence[str]) -> None:
    """Refuse options that the backend of the target does not take."""
    for name in target.options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            takes = f"it takes {list(known)}" if known else "it takes none"
            raise CompileError(f"the target {target.name!r} has no option {name!r}", hint=guess + takes)


def host_architecture() -> str:
    """This machine's architecture in the spelling of Linux."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
