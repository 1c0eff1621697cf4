"""Hugging Face models whose layers lack parts or share tensors: how they are loaded, and what is dropped then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from sylvester.compiler import registry
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface_skips import (
    ALL,
    DECODE,
    DECODE_SKIP,
    PER_LAYER,
    Skips,
    acts_on_skips,
    read_skips,
    require_understood,
    without,
)
from sylvester.compiler.layers import NUMBERS, find_layers
from sylvester.compiler.program import Program
from sylvester.compiler.verify import verify
from sylvester.compiler.weights import ALIAS_PREFIX

WANTED, ABSENT, DEPTH, SKIPPED = "skips", "absent", "depth", "skipped"
"""In `Program.info`: what is still to be dropped, weights without values, layers of the config, what was dropped."""


@dataclass(frozen=True)
class Plan:
    """`skips` are still to be dropped from the model, `done` its class left out; `options` of from_pretrained."""

    depth: int = 0
    skips: Skips = field(default_factory=dict)
    done: Skips = field(default_factory=dict)
    incomplete: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def facts(self, missing: list[str]) -> dict[str, Any]:
        facts: dict[str, Any] = {DEPTH: self.depth} if self.depth else {}
        if self.skips or self.incomplete:
            facts |= {WANTED: self.skips, ABSENT: missing}
        if self.done:
            gone = set.intersection(*(set(self.done[ALL].get(kind, ())) for kind in ("attention", "ffn")))
            facts |= {SKIPPED: self.done, NUMBERS: [n for n in range(self.depth) if n not in gone]}
        return facts


def plan_skips(cls: Any, config: dict[str, Any], whole: bool) -> Plan:
    """How to load the model of a config; with `whole` nothing is left out and weights may be absent."""
    known = getattr(cls, "config_class", None)
    if known is None:
        if PER_LAYER in config or DECODE_SKIP in config:
            raise CompileError(f"{PER_LAYER} needs the name of the model class, found no `architectures`")
        return Plan()
    plain = known.from_dict({key: item for key, item in config.items() if key != PER_LAYER})
    depth = int(getattr(plain, "num_hidden_layers", 0) or 0)
    skips = read_skips(config, depth)
    require_understood(cls, config, depth)
    native = ALL in skips and acts_on_skips(cls, config, depth)
    options = {"config": known.from_dict(without(config, depth))} if whole or (skips and not native) else {}
    if whole:
        return Plan(depth, {}, {}, True, options)
    done = {ALL: skips.pop(ALL)} if native else {}
    return Plan(depth, skips, done, ALL in skips, options)


def tie(model: nn.Module, folder: Path, missing: Iterable[str]) -> list[str]:
    """Let parameters that the files name as aliases be the ones they stand for; returns what is missing still."""
    names = set(missing)
    if not names:
        return []
    aliases = aliases_of(sorted(folder.glob("*.safetensors")))
    for name in names & set(aliases):
        parent, _, own = name.rpartition(".")
        source, _, wanted = aliases[name].rpartition(".")
        try:
            setattr(model.get_submodule(parent), own, getattr(model.get_submodule(source), wanted))
        except AttributeError as error:
            raise CompileError(f"{name!r} is an alias of {aliases[name]!r}, which the model lacks") from error
    return sorted(names - set(aliases))


def aliases_of(files: Iterable[Path]) -> dict[str, str]:
    """Names in the metadata of safetensors files -> the names they stand for."""
    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
        found |= {k.removeprefix(ALIAS_PREFIX): v for k, v in entries.items() if k.startswith(ALIAS_PREFIX)}
    return found


def leave_out(program: Program, phase: str) -> None:
    """Drop what the config of the folder skips in a phase; nothing for other programs."""
    wanted = program.info.get(WANTED, {}).pop(phase, {})
    if not wanted:
        return
    drop(program, phase, wanted)
    text = ", ".join(f"{kind} of layers {numbers}" for kind, numbers in wanted.items())
    program.info["notes"].append(f"left out as the config says ({'decode' if phase == DECODE else 'always'}): {text}")


def drop(program: Program, phase: str, wanted: Mapping[str, list[int]]) -> Changes:
    """Drop parts of layers, by the numbers the layers had in the whole model."""
    now = {original: index for index, original in enumerate(_numbers(program))}
    if (count := len(find_layers(program))) != len(now):
        raise CompileError(f"the config skips parts of {len(now)} layers, {count} are found in the program")
    gone = sorted({n for numbers in wanted.values() for n in numbers} - set(now))
    if gone:
        raise CompileError(f"layer {gone[0]} is to be skipped in {phase!r}, but nothing of it is left")
    given = {kind: tuple(now[n] for n in numbers) for kind, numbers in wanted.items()}
    step = registry.lookup("passes", "drop-sublayers")(**given, phase=phase)
    step.requires(program)
    changes: Changes = step.run(program)
    if changes.refused:
        first = changes.refused[0]
        raise CompileError(f"cannot skip {first.rule} of {first.where}: {first.reason}")
    program.sweep()
    verify(program)
    return changes


def _numbers(program: Program) -> list[int]:
    return list(program.info.get(NUMBERS) or range(program.info.get(DEPTH, 0)))


def require_present(program: Program) -> None:
    """Every weight that is still read has values."""
    absent = program.info.pop(ABSENT, [])
    program.info.pop(WANTED, None)
    used = [name for name in absent if descendants(program, name)]
    if used:
        where = program.info.get("source")
        raise CompileError(f"the weights in {where!r} lack {len(used)} tensors that are read, the first is {used[0]!r}")


def descendants(program: Program, name: str) -> list[str]:
    """The stored weights that are a captured one, or that were computed from it."""
    key = program.weights.resolve(name)
    return [own for own in program.weights if own == key or own.startswith(f"{key}.")]
