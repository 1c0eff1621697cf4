"""Which variant of `decode` takes a step: by the position it stands at and by how many tokens were generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DECODE = "decode"
KEY = "stages"
"""Key of `Program.info`; absent: every step is `decode`."""
DRAFT = "draft"
"""Key of `Program.info`: the fields of `manifest.DraftSpec`."""
TREE, DEPTHS = "tree", "depths"
"""The entry that reads a tree of tokens in preorder, and its input, int64 [length]: how deep each is."""
SKIPS = "skips"
"""Input of an entry whose parts can be skipped, and key of `Program.info`: the layer and the kind of each part."""


@dataclass(frozen=True)
class Stage:
    """From `position` on, and from `generated` new tokens on, steps run `entry`; of several the last counts."""

    entry: str
    position: int = 0
    generated: int = 0


def stages_of(info: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a program, at least one."""
    return tuple(Stage(**given) for given in info.get(KEY, ())) or (Stage(DECODE),)


def remember(info: dict[str, Any], stages: Sequence[Stage]) -> None:
    info[KEY] = [asdict(stage) for stage in stages]


def entry_at(stages: Sequence[Stage], position: int, generated: int) -> str:
    """The entry that takes the step."""
    reached = [s.entry for s in stages if s.position <= position and s.generated <= generated]
    return reached[-1] if reached else DECODE


def spans(stages: Sequence[Stage], length: int, prompt: int = 0) -> Iterator[tuple[str, int, int]]:
    """(entry, first, end) of the positions from `prompt` to `length`, read as if each were generated."""
    start = prompt
    for at in range(prompt, length):
        entry = entry_at(stages, start, start - prompt)
        if entry_at(stages, at, at - prompt) != entry:
            yield entry, start, at
            start = at
    if start < length:
        yield entry_at(stages, start, start - prompt), start, length
