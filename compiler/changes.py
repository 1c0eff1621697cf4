"""What a pass did and what it declined: the vocabulary shared by rules, passes and the ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from sylvester.compiler.errors import module_path


@dataclass(frozen=True)
class Refusal:
    """Why something was not done, and at which node. An ordinary value: test it with isinstance."""

    reason: str
    at: fx.Node | None = None


@dataclass(frozen=True)
class Applied:
    """One thing a pass did: the rule or verb, and the node or module path it was done to."""

    rule: str
    where: str


@dataclass(frozen=True)
class Refused:
    """One thing a pass found and left alone."""

    rule: str
    where: str
    reason: str


@dataclass
class Changes:
    """The record of one pass, in order."""

    applied: list[Applied] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def apply(self, rule: str, where: fx.Node | str) -> None:
        self.applied.append(Applied(rule, place(where)))

    def refuse(self, rule: str, refusal: Refusal, where: fx.Node | str = "") -> None:
        """Note a refusal at its own node, else at `where`."""
        self.refused.append(Refused(rule, place(where if refusal.at is None else refusal.at), refusal.reason))

    def extend(self, other: Changes) -> None:
        self.applied += other.applied
        self.refused += other.refused

    def counts(self) -> dict[str, int]:
        """Applications by rule."""
        return dict(Counter(item.rule for item in self.applied))


def place(where: fx.Node | str) -> str:
    """The node's name with its module path."""
    if isinstance(where, str):
        return where
    path = module_path(where)
    return f"{where.name} in {path}" if path else where.name
