"""Does `decode` compute of each token what `prefill` does, but for rounding? A prompt may then be read in parts."""

from __future__ import annotations

from typing import cast

from torch import fx

from sylvester.compiler.cache_ops import UPDATES
from sylvester.compiler.program import Program, value
from sylvester.compiler.stages import DECODE
from sylvester.compiler.student import generates_otherwise


def is_uniform(program: Program) -> bool:
    """Each entry reads the same matrices, and caches hold the keys and values as they are."""
    return DECODE in program.entries and not generates_otherwise(program) and not _rounds(program)


def _rounds(program: Program) -> bool:
    updates = program.entries[DECODE].calls(*UPDATES)
    return any(value(node).dtype != value(cast(fx.Node, node.args[1])).dtype for node in updates)
