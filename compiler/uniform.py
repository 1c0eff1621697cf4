"""Does `decode` compute of each token what `prefill` does, but for rounding? A prompt may then be read in parts."""

from __future__ import annotations

from sylvester.compiler.program import Program
from sylvester.compiler.stages import DECODE
from sylvester.compiler.student import generates_otherwise


def is_uniform(program: Program) -> bool:
    """Each entry reads the same matrices, and caches hold keys and values as real numbers, not in a few bits."""
    floats = all(slot.dtype.is_floating_point for slot in program.state.values())
    return floats and DECODE in program.entries and not generates_otherwise(program)
