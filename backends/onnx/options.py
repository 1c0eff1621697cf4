"""The options of the target: the version of the standard ops, and whether onnxruntime's own ops are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sylvester.compiler.errors import CompileError

OLDEST, NEWEST = 18, 24
"""Reductions take their axes as inputs from opset 18 on; attention over caches that are filled in part came with 24."""
IR_VERSION = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11}
"""The oldest IR that holds an opset."""
KINDS = ("standard", "ort")


@dataclass(frozen=True)
class Options:
    """`ops` "standard" writes ops of ONNX only, "ort" also those of com.microsoft, which onnxruntime runs faster."""

    opset: int = NEWEST
    ops: str = "standard"

    @staticmethod
    def parse(given: Mapping[str, object]) -> Options:
        opset, ops = given.get("opset", NEWEST), given.get("ops", KINDS[0])
        opset = int(opset) if isinstance(opset, str) and opset.isdigit() else opset
        if not isinstance(opset, int) or isinstance(opset, bool) or not OLDEST <= opset <= NEWEST:
            age = "is too old" if isinstance(opset, int) and opset < OLDEST else "is unknown"
            hint = f"leave it out for {NEWEST}"
            raise CompileError(f"opset {opset!r} {age}, expected a number from {OLDEST} to {NEWEST}", hint=hint)
        if ops not in KINDS:
            hint = "'ort' uses what only onnxruntime has"
            raise CompileError(f"ops is {ops!r}, expected one of {list(KINDS)}", hint=hint)
        return Options(opset, str(ops))
