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
    return {point.name: point.value for point in entry_points(group=f"sylvester.{kind}")} | dict(_own(kind))


def _own(kind: str) -> Mapping[str, str]:
    module, attribute = {
        "passes": ("sylvester.passes", "PASSES"),
        "recipes": ("sylvester.passes", "RECIPES"),
        "targets": ("sylvester.backends", "BACKENDS"),
        "loaders": ("sylvester.backends", "LOADERS"),
    }[kind]
    own: Mapping[str, str] = getattr(importlib.import_module(module), attribute)
    return own


def lookup(kind: str, name: str) -> Any:
    """The object registered under `name`; an unknown name is an error with the nearest ones."""
    known = table(kind)
    if name not in known:
        names = sorted({**known, **(table("recipes") if kind == "passes" else {})})
        close = difflib.get_close_matches(name, names, 3, 0.5)
        guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise CompileError(f"no {NOUNS[kind]} named {name!r}", hint=f"{guess}there are {names}")
    if known[name] in _own(kind).values():
        return resolve(known[name])
    return _foreign(kind, name, known[name])


def _foreign(kind: str, name: str, place: str) -> Any:
    """What another package registered; an error names the package when it is not what it has to be."""
    try:
        found = resolve(place)
    except Exception as error:
        raise CompileError(
            f"the {NOUNS[kind]} {name!r} of {_package(kind, name)} cannot be imported from {place!r}: "
            f"{type(error).__name__}: {error}",
            hint="mend or uninstall that package",
        ) from error
    if wrong := _wrong(kind, name, found):
        raise CompileError(
            f"the {NOUNS[kind]} {name!r} of {_package(kind, name)} {wrong}",
            hint=f"{place!r} is what its entry point of the group 'sylvester.{kind}' names",
        )
    return found


def _wrong(kind: str, name: str, found: Any) -> str:
    if kind == "passes":
        from sylvester.compiler.pipeline import Pass

        if not (isinstance(found, type) and issubclass(found, Pass)):
            return f"is {found!r}, expected a subclass of sylvester.compiler.pipeline.Pass"
        if getattr(found, "contract", None) not in ("exact", "lossy", "drafted"):
            return f"has the contract {getattr(found, 'contract', None)!r}, expected 'exact', 'lossy' or 'drafted'"
    if kind == "targets" and not callable(getattr(found, "build", None)):
        return "has no method build(program, target, folder, progress)"
    if kind == "loaders" and not callable(found):
        return f"is {found!r}, expected a function load(folder, manifest, threads)"
    named = getattr(found, "name", name)
    return f"calls itself {named!r}" if kind in ("passes", "targets") and named != name else ""


def _package(kind: str, name: str) -> str:
    """The distribution that registered a name."""
    point = next(point for point in entry_points(group=f"sylvester.{kind}") if point.name == name)
    return f"the package {point.dist.name!r}" if point.dist else "another package"


def resolve(place: str) -> Any:
    """The object at "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def loader(target: str) -> Callable[..., Any]:
    """What loads an artefact for `target`."""
    function: Callable[..., Any] = lookup("loaders", target)
    return function
