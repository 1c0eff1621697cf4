"""TVM as an engine that may build regions of a program instead of our C compiler; imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from sylvester.codegen.isa import Isa
from sylvester.codegen.region import Refused, Region
from sylvester.codegen.space import Candidate

PACKAGE = "apache-tvm"
MISSING = "it is not installed: pip install 'sylvester[tvm]'"


class EngineMissing(Exception):
    """An engine cannot be used here; the text says why and what to do."""


@dataclass(frozen=True)
class Engine:
    """Another compiler for regions.

    `candidates`: what it tries on a region. `source`: C text with NAME that takes the place of ours, or `Refused`.
    """

    name: str
    version: str
    candidates: Callable[[Region, Isa], tuple[Candidate, ...]]
    source: Callable[[Region, Candidate, Isa], str]


def version() -> str:
    """Of the installed package, empty without one."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return ""


def _modules() -> tuple[Any, Any]:
    return import_module("sylvester.codegen.tvm_region"), import_module("sylvester.codegen.tvm_source")


def load() -> Engine:
    """`EngineMissing` when TVM is not installed, or does not start."""
    try:
        regions, sources = _modules()
    except ModuleNotFoundError as error:
        raise EngineMissing(MISSING if error.name in ("tvm", "tvm_ffi") else str(error)) from error
    except Exception as error:  # whatever the package raises while it loads its libraries
        raise EngineMissing(f"it does not start: {first_line(error)}") from error

    def schedule(candidate: Candidate) -> Any:
        ((kind, lanes),) = candidate.parameters.items()
        return regions.Schedule(lanes, rows=kind == "TVM_ROWS")

    def candidates(region: Region, isa: Isa) -> tuple[Candidate, ...]:
        found = regions.schedules(region, isa.vector)
        return tuple(Candidate({"TVM_ROWS" if s.rows else "TVM_LANES": s.lanes}) for s in found)

    def source(region: Region, candidate: Candidate, isa: Isa) -> str:
        try:
            return str(sources.source(region, schedule(candidate), isa))
        except Refused:
            raise
        except Exception as error:  # TVM raises many types of its own
            raise Refused(f"it failed: {first_line(error)}") from error

    return Engine("tvm", version(), candidates, source)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
