"""Prompts of a batch that begin alike: the beginning is read once, and kept once where attention can share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.runner import SHARED
from sylvester.compiler.session import Session, first_entry, generation_of, ids_input
from sylvester.compiler.stages import DECODE

if TYPE_CHECKING:
    from sylvester.compiler.session import Ids

LEAST = 64
"""Tokens of a beginning that is worth sharing."""
ROWS = 4
"""Rows from which on attention over shared keys is faster; fewer get copies."""


@dataclass
class Sharing:
    """What sharing did so far: batches, tokens that were not read again, and of these those kept once.

    `refused` says why the last batch that begins alike was read row by row; empty: none was.
    """

    batches: int = 0
    spared: int = 0
    kept: int = 0
    refused: str = ""

    def __str__(self) -> str:
        done = f"{self.batches} batches began alike: {self.spared} tokens not read again, {self.kept} kept once"
        return f"{done}; refused: {self.refused}" if self.refused else done


def share(session: Session, prompt: Ids, wanted: bool | None, done: Sharing) -> None:
    """Read what all rows of a prompt [batch, length] begin with, if it pays or is `wanted`.

    `Unsupported` where it is wanted and cannot be.
    """
    if wanted is False:
        if session.state.shared:
            session.rewind(0)
        return
    count = common(prompt)
    if len(prompt) < 2 or count < (1 if wanted else LEAST):
        return
    manifest = session.runner.manifest
    if reason := refusal(manifest, bool(wanted)):
        if wanted:
            raise Unsupported(f"rows cannot share the beginning of their prompts: {reason}", hint="share=False")
        done.refused = reason
        return
    keep = SHARED in (spec.name for spec in manifest.entries[DECODE].inputs) and len(prompt) >= ROWS
    spared = max(0, count - session.position) * (len(prompt) - 1)
    session.share(prompt[0, :count], keep)
    done.batches, done.spared = done.batches + 1, done.spared + spared
    done.kept += spared if keep else 0


def common(prompt: Ids) -> int:
    """How many first tokens are those of every row; less than the prompt has."""
    differs = (prompt[:, :-1] != prompt[:1, :-1]).any(0)
    return int(differs.argmax()) if differs.any() else prompt.shape[1] - 1


def refusal(manifest: Manifest, inexact: bool) -> str:
    """Why one row cannot read for all, or not with the same result; empty: it can."""
    generation = generation_of(manifest)
    if not (generation.uniform or inexact):
        return "`decode` computes other than `prefill`, so that reading in parts changes the result"
    for name in (first_entry(manifest), DECODE):
        entry = manifest.entries[name]
        batch = next(spec.shape[0] for spec in entry.inputs if spec.name == ids_input(manifest))
        least = next((symbol.min for symbol in entry.symbols if symbol.name == batch), batch)
        if least != 1:
            return f"{name!r} takes batches of {least}, one row alone does not fit"
        for key in entry.states:
            shape = manifest.state[key].shape
            if len(shape) != 4 or shape[0] != batch or shape[2] != generation.max_length:
                expected = f"[batch, heads, {generation.max_length}, features]"
                return f"the state {key!r} is of shape {list(shape)}, expected {expected}"
    return ""
