"""Layers or their parts taken out of the entries that run them: streams closed, caches dropped, `start` made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.layer_lines import slots_of
from sylvester.compiler.layers import NUMBERS, START, Layer
from sylvester.compiler.printing import fact
from sylvester.compiler.program import Program
from sylvester.compiler.region import bypass, drop_addend
from sylvester.compiler.slots import drop_slots
from sylvester.passes.last_logits import LastLogits

Phase = Literal["decode", "all"]
DECODE, SKIPPED = "decode", "skipped"
"""`Program.info["skipped"]`: phase -> kind of part -> original numbers of the layers that lack it."""


def require_phase(program: Program, phase: Phase) -> None:
    """Only a program that decodes has a phase of its own for it."""
    if phase == DECODE and DECODE not in program.entries:
        raise Unsupported(
            f"phase='decode' needs an entry 'decode', the program has {list(program.entries)}",
            hint="phase='all' takes layers out of every entry",
        )


def entries_of(program: Program, phase: Phase) -> list[str]:
    """The entries that a phase edits; `start` is made again from `prefill`."""
    return [name for name in program.entries if name != START and (phase == "all" or name == DECODE)]


@dataclass
class Depth:
    """Collects what is taken out of a program, and then settles caches, `start` and the numbers of layers."""

    program: Program
    layers: Sequence[Layer]
    phase: Phase
    changes: Changes
    slots: list[str] = field(default_factory=list)
    gone: dict[int, list[str]] = field(default_factory=dict)

    def drop_layers(self, layers: Sequence[Layer]) -> None:
        """The stream goes from the start of each layer to its end; the last first, whose start ends the one before."""
        for layer in sorted(layers, key=lambda layer: -layer.index):
            self._drop_layer(layer)

    def _drop_layer(self, layer: Layer) -> None:
        names = entries_of(self.program, self.phase)
        refusal = next((r for name in names if (r := _unequal(layer, name))), None)
        if refusal:
            self.changes.refuse("layer", refusal, layer.path)
            return
        for name in names:
            site = layer.sites[name]
            bypass(self.program.entries[name], site.start, site.end)
        for kind in dict.fromkeys(part.kind for part, _ in layer.main.parts):
            self._gone(layer, kind)
        self._record(layer, "block")

    def drop_part(self, layer: Layer, kind: str) -> None:
        """The stream goes on without what parts of this kind add."""
        names = entries_of(self.program, self.phase)
        missing = [name for name in names if name not in layer.sites or not layer.sites[name].of_kind(kind)]
        if missing:
            found = sorted({part.kind for part, _ in layer.main.parts})
            self.changes.refuse(kind, Refusal(f"it has no {kind} in {missing[0]!r}, its parts are {found}"), layer.path)
            return
        for name in names:
            for part, segment in layer.sites[name].of_kind(kind):
                drop_addend(self.program.entries[name], segment.end, part.writer)
        self._gone(layer, kind)
        self._record(layer, kind)

    def settle(self) -> None:
        """Caches that nothing reads any more go, the others are renumbered; `start` follows `prefill`."""
        if self.slots:
            self.changes.renamed |= drop_slots(self.program, self.slots)
            self.changes.note(f"{len(self.slots)} caches dropped, {len(self.program.state)} left")
        if START in self.program.entries and (self.slots or self.phase == "all"):
            derive_start(self.program, self.changes)
        self._remember()

    def _gone(self, layer: Layer, kind: str) -> None:
        self.gone.setdefault(layer.index, []).append(kind)
        site = layer.sites.get(DECODE)
        if site:
            self.slots += [key for part, _ in site.of_kind(kind) for key in slots_of(part) if key not in self.slots]

    def _record(self, layer: Layer, part: str) -> None:
        self.changes.apply(part, layer.path)
        self.changes.became(layer.path, part, "dropped" if self.phase == "all" else "skipped in decode")

    def _remember(self) -> None:
        """What later passes and exports must know of the layers of the model."""
        info = self.program.info
        known = info.setdefault(SKIPPED, {}).setdefault(self.phase, {})
        for layer in self.layers:
            for kind in self.gone.get(layer.index, ()):
                known[kind] = sorted({*known.get(kind, ()), layer.original})
        if self.phase == "all":
            info[NUMBERS] = [layer.original for layer in self.layers if not self._whole(layer)]

    def _whole(self, layer: Layer) -> bool:
        """Whether nothing of a layer is left."""
        return {part.kind for part, _ in layer.main.parts} <= set(self.gone.get(layer.index, ()))


def _unequal(layer: Layer, name: str) -> Refusal | None:
    site = layer.sites.get(name)
    if site is None:
        return Refusal(f"the entry {name!r} does not run it")
    if fact(site.start) != fact(site.end):
        turned = f"it turns {fact(site.start)} into {fact(site.end)}"
        return Refusal(f"{turned}: only layers that keep shape and type can go", site.end)
    return None


def derive_start(program: Program, changes: Changes) -> None:
    """`start` again from `prefill`; without it, generation begins with `prefill`."""
    del program.entries[START]
    found = LastLogits(check=False).run(program)
    changes.refused += found.refused


def edited(program: Program, layers: Sequence[Layer], phase: Phase, edit: Callable[[Depth], None]) -> Changes:
    """The changes of an edit, settled; a program cannot lose its last layer."""
    changes = Changes()
    depth = Depth(program, layers, phase, changes)
    edit(depth)
    if phase == "all" and layers and all(depth._whole(layer) for layer in layers):
        raise CompileError(f"all {len(layers)} layers would go, expected at least one to stay")
    depth.settle()
    return changes
