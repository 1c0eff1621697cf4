"""Passes, backends and loaders by name: built-in tables of "module:Class", and entry points of other packages."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from sylvester.compiler.errors import CompileError

NOUNS = {"passes": "pass", "recipes": "recipe", "targets": "target", "loaders": "target"}


def table(kind: str) -> dict[str, str]:
    """Names of a kind ("passes", "recipes", "targets" or "loaders") with the place of each.

    Other packages add to it with the entry point group `sylvester.<kind>`; a name of ours stays ours.
    """
    module, attribute = {
        "passes": ("sylvester.passes", "PASSES"),
        "recipes": ("sylvester.passes", "RECIPES"),
        "targets": ("sylvester.backends", "BACKENDS"),
        "loaders": ("sylvester.backends", "LOADERS"),
    }[kind]
    own: Mapping[str, str] = getattr(importlib.import_module(module), attribute)
    return {point.name: point.value for point in entry_points(group=f"sylvester.{kind}")} | dict(own)


def lookup(kind: str, name: str) -> Any:
    """The object registered under `name`; an unknown name is an error with the nearest ones."""
    known = table(kind)
    if name not in known:
        names = sorted({**known, **(table("recipes") if kind == "passes" else {})})
        close = difflib.get_close_matches(name, names, 3, 0.5)
        guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise CompileError(f"no {NOUNS[kind]} named {name!r}", hint=f"{guess}there are {names}")
    return resolve(known[name])


def resolve(place: str) -> Any:
    """The object at "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def loader(target: str) -> Callable[..., Any]:
    """What loads an artefact for `target`."""
    function: Callable[..., Any] = lookup("loaders", target)
    return function
