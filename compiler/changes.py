"""What a pass did, declined and found out: the vocabulary shared by rules, passes and the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, fx

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


@dataclass(frozen=True)
class Figure:
    """A number that a pass measured at a place: `name` says what, with its unit, such as "sqnr dB"."""

    where: str
    name: str
    value: float


@dataclass(frozen=True)
class Became:
    """What a part of a layer became: `part` is "attention", "ffn" or "block", `what` a short text such as "dropped"."""

    layer: str
    part: str
    what: str


@dataclass
class Changes:
    """The record of one pass, in order.

    `notes` are decisions the ledger prints, `figures` what was measured on calibration data, `layers` what layers
    became. `bases` says how an exact pass changed what a state slot means: the new content of the slot is the function
    of the old. `renamed` says which slot has which name now, for slots that a pass renumbered. `checked` is the
    relative error that an exact pass found itself, where a run of the program alone cannot tell.
    """

    applied: list[Applied] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    layers: list[Became] = field(default_factory=list)
    bases: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    checked: float | None = None

    def apply(self, rule: str, where: fx.Node | str) -> None:
        self.applied.append(Applied(rule, place(where)))

    def refuse(self, rule: str, refusal: Refusal, where: fx.Node | str = "") -> None:
        """Note a refusal at its own node, else at `where`."""
        self.refused.append(Refused(rule, place(where if refusal.at is None else refusal.at), refusal.reason))

    def extend(self, other: Changes) -> None:
        self.applied += other.applied
        self.refused += other.refused
        self.notes += other.notes
        self.figures += other.figures
        self.layers += other.layers
        self.bases |= other.bases
        self.renamed |= other.renamed

    def note(self, text: str) -> None:
        """Say once what was decided and why."""
        if text not in self.notes:
            self.notes.append(text)

    def became(self, layer: str, part: str, what: str) -> None:
        self.layers.append(Became(layer, part, what))

    def figure(self, where: str, name: str, value: float) -> None:
        self.figures.append(Figure(where, name, value))

    def counts(self) -> dict[str, int]:
        """Applications by rule."""
        return dict(Counter(item.rule for item in self.applied))


def place(where: fx.Node | str) -> str:
    """The node's name with its module path."""
    if isinstance(where, str):
        return where
    path = module_path(where)
    return f"{where.name} in {path}" if path else where.name
