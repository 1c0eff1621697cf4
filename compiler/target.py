"""What a pass or a lowering needs to know of the machine a program is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sylvester.compiler.errors import CompileError

BUILT_IN = ("cpu", "reference", "null")


@dataclass(frozen=True)
class Target:
    """A backend name and its options. `isas` empty: every variant of the backend; `threads` 0: chosen at load."""

    name: str = "cpu"
    threads: int = 0
    isas: tuple[str, ...] = ()
    max_length: int = 0

    @staticmethod
    def parse(target: Target | str, *, threads: int | None = None) -> Target:
        chosen = target if isinstance(target, Target) else Target(target)
        if threads is not None and threads < 1:
            raise CompileError(f"threads must be at least 1, found {threads}")
        return replace(chosen, threads=threads) if threads is not None else chosen
