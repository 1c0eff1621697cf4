"""What tests of rotations share: running the pass, what it did, and small graphs to rotate."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.rotate_hadamard import RotateHadamard
from tests.graphs import EMBEDDING, Builder, dialect

HADAMARD = dialect.hadamard.default
MIXED = "hadamard does not commute with a rotation of its features"
NONE = {"residual": False, "values": False, "ffn": False}


def rotate(program: Program, *passes: RotateHadamard) -> tuple[Program, Changes]:
    """The program after passes that kept its outputs, and what the last one did."""
    done, ledger = Pipeline(passes).run(program)
    assert all(row.error is not None and row.error < 3e-6 for row in ledger.rows)
    return done, ledger.rows[-1].changes


def transforms(program: Program, entry: str = "forward") -> int:
    return len(program.entries[entry].calls(HADAMARD))


def reasons(changes: Changes) -> set[tuple[str, str]]:
    return {(refused.rule, refused.reason) for refused in changes.refused}


def stream(b: Builder, width: int = 8, key: str = "table") -> fx.Node:
    return b.call(EMBEDDING, b.weight(key, 16, width), b.ids(2, 6, high=16))


def attended(b: Builder, turn: Callable[[Builder, fx.Node], fx.Node] = lambda b, x: x) -> fx.Node:
    q, k, v = (b.heads(b.linear(stream(b, 8, f"{part}.table"), part, 8), 2) for part in "qkv")
    return b.joined(b.attention(turn(b, q), turn(b, k), v))
