"""{"per_layer_config": {"3": {"skip": ["attention", "mlp"]}}}: the skip schema of Hugging Face configs, both ways.

transformers keeps the schema in a config; its model classes build every layer all the same, unless they read it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sylvester.compiler.errors import CompileError

PER_LAYER, SKIP = "per_layer_config", "skip"
DECODE_SKIP = "sylvester_decode_skip"
"""Ours: what is left out of decoding only, which the schema cannot say, as layers by kind of part."""
KINDS = {"attention": "attention", "mlp": "ffn"}
"""Names of the schema and the kinds of parts they stand for."""
ALL, DECODE = "all", "decode"
Skips = dict[str, dict[str, list[int]]]
"""Phase ("all", "decode") -> kind of part -> numbers of the layers that lack it: `Program.info["skipped"]`."""


def read_skips(config: Mapping[str, Any], layers: int) -> Skips:
    """What a config leaves out of a model of `layers` layers; `CompileError` names what is malformed."""
    found: Skips = {ALL: {}, DECODE: {}}
    for number, overrides in per_layer(config, layers).items():
        for name in _names(overrides.get(SKIP, []), number):
            found[ALL].setdefault(KINDS[name], []).append(number)
    given = config.get(DECODE_SKIP, {})
    if not isinstance(given, dict) or not set(given) <= set(KINDS.values()):
        shown = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise CompileError(f"{DECODE_SKIP} holds {shown}, expected lists of layers under {list(KINDS.values())}")
    for kind, numbers in given.items():
        if not isinstance(numbers, list):
            raise CompileError(f"{DECODE_SKIP} has a {type(numbers).__name__} for {kind!r}, expected a list of layers")
        found[DECODE][kind] = [_layer(number, layers, DECODE_SKIP) for number in numbers]
    return ordered(found)


def ordered(skips: Mapping[str, Mapping[str, Iterable[int]]]) -> Skips:
    """Attention before ffn, each layer once, without what is empty."""
    made = {
        phase: {kind: sorted(set(kinds[kind])) for kind in KINDS.values() if kinds.get(kind)}
        for phase, kinds in skips.items()
    }
    return {phase: made[phase] for phase in (ALL, DECODE) if made.get(phase)}


def per_layer(config: Mapping[str, Any], layers: int) -> dict[int, dict[str, Any]]:
    """The overrides of each layer."""
    given = config.get(PER_LAYER)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise CompileError(f"{PER_LAYER} is a {type(given).__name__}, expected an object with layer numbers as keys")
    found: dict[int, dict[str, Any]] = {}
    for key, overrides in given.items():
        number = _layer(key, layers, PER_LAYER)
        if number in found:
            raise CompileError(f"{PER_LAYER} names layer {number} twice, the second time as {key!r}")
        if not isinstance(overrides, dict):
            raise CompileError(f"{PER_LAYER} of layer {number} is a {type(overrides).__name__}, expected an object")
        found[number] = overrides
    return found


def _layer(given: object, layers: int, where: str) -> int:
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(number, bool) or not isinstance(number, int):
        raise CompileError(f"{where} names layer {given!r}, expected a number from 0 to {layers - 1}")
    if not 0 <= number < layers:
        raise CompileError(
            f"{where} names layer {number}, the model has layers 0 to {layers - 1}", hint="layers are numbered from 0"
        )
    return number


def _names(skip: object, layer: int) -> Sequence[str]:
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise CompileError(f"{PER_LAYER} of layer {layer} has {SKIP}={skip!r}, expected a list of names {list(KINDS)}")
    if unknown := [name for name in skip if name not in KINDS]:
        raise CompileError(f"{PER_LAYER} of layer {layer} skips {unknown[0]!r}, expected one of {list(KINDS)}")
    return skip


def write_skips(config: Mapping[str, Any], skips: Skips, layers: int) -> dict[str, Any]:
    """The config with these skips instead of its own; other overrides of layers stay."""
    overrides = {n: {k: v for k, v in own.items() if k != SKIP} for n, own in per_layer(config, layers).items()}
    for name, kind in KINDS.items():
        for number in skips.get(ALL, {}).get(kind, ()):
            overrides.setdefault(number, {}).setdefault(SKIP, []).append(name)
    digits = len(str(max(overrides, default=0)))
    written = {str(n).zfill(digits): overrides[n] for n in sorted(overrides) if overrides[n]}
    plain = {key: item for key, item in config.items() if key not in (PER_LAYER, DECODE_SKIP)}
    own = {DECODE_SKIP: skips[DECODE]} if skips.get(DECODE) else {}
    return plain | ({PER_LAYER: written} if written else {}) | own


def acts_on_skips(cls: Any, config: Mapping[str, Any], layers: int) -> bool:
    """Whether the class leaves out what the config skips by itself: it then has fewer parameters."""
    with torch.device("meta"):
        names = [set(cls(cls.config_class.from_dict(c)).state_dict()) for c in (dict(config), without(config, layers))]
    return names[0] < names[1]


def without(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config of the whole model."""
    return write_skips(config, {}, layers)


def require_understood(cls: Any, config: Mapping[str, Any], layers: int) -> None:
    """Overrides other than skips change a model only where its code reads them; elsewhere they would be ignored."""
    others = [(n, key) for n, own in per_layer(config, layers).items() for key in own if key != SKIP]
    if others and PER_LAYER not in inspect.getsource(sys.modules[cls.__module__]):
        number, key = others[0]
        raise CompileError(
            f"{PER_LAYER} of layer {number} sets {key!r}, which {cls.__name__} does not act on",
            hint=f"expected only {SKIP!r}, a list of names {list(KINDS)}",
        )
