"""How many cores this process may keep busy: those it may run on, or fewer where its control group has a quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def usable(own: Path = Path("/proc/self/cgroup"), groups: Path = GROUPS) -> int:
    """At least 1. More threads than a quota has cores for wait for each other while the kernel holds them back."""
    quotas = [math.ceil(quota) for quota in _quotas(own, groups)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _quotas(own: Path, groups: Path) -> Iterator[float]:
    """Cores that the group of this process and those above it grant, in both versions of the interface."""
    with suppress(OSError, ValueError):
        quota, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            yield int(quota) / int(period)
    with suppress(OSError):
        path = next((line[3:] for line in own.read_text().splitlines() if line.startswith("0::")), "/")
        group = Path(os.path.normpath(f"/{path}"))
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                granted, period = (groups / str(folder).lstrip("/") / "cpu.max").read_text().split()
                yield int(granted) / int(period)
