"""Names, recipes and passes as given -> passes; a recipe chooses its passes when the program is known."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from sylvester.compiler import registry
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.recipe import Expansion, Machine, Recipe

Step = Pass | Recipe


def resolve_passes(passes: str | Step | Sequence[str | Step]) -> tuple[Step, ...]:
    """Instances for names, recipes and instances; one text may list several, separated by commas.

    An unknown name is an error that names the nearest ones.
    """
    if isinstance(passes, (str, Pass, Recipe)):
        passes = [passes]
    if not isinstance(passes, Iterable):
        raise not_a_step("passes hold", passes)
    return tuple(step for given in passes for step in _steps(given))


def _steps(given: str | Step) -> tuple[Step, ...]:
    if isinstance(given, (Pass, Recipe)):
        return (given,)
    if not isinstance(given, str):
        raise not_a_step("passes hold", given)
    return tuple(step for text in separated(given) or [given] for step in _named(text))


def not_a_step(holds: str, found: object, none: str = "()") -> TypeError:
    """For what is neither a text nor a pass or recipe; `holds` begins the message, `none` stands for nothing."""
    if isinstance(found, type):
        return TypeError(f"{holds} the class {found.__name__}, expected an instance: {found.__name__}()")
    expected = f"texts such as 'w4a8', passes and recipes, or a list of these; {none} for none"
    return TypeError(f"{holds} {found!r}, expected {expected}")


def separated(text: str) -> list[str]:
    """The texts of passes in a list such as "fold-norms, quantize(weights=4, group=32)"."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _named(text: str) -> tuple[Step, ...]:
    """A recipe, which may be a plain list of passes, or one pass, with options as its own text has them."""
    name, given, options = text.partition("(")
    if not given and name in registry.table("recipes"):
        recipe: Recipe | tuple[Pass, ...] = registry.lookup("recipes", name)
        return (recipe,) if isinstance(recipe, Recipe) else recipe
    return (_configured(name, options if given else ")", text),)


def _configured(name: str, options: str, text: str) -> Pass:
    if name in registry.table("recipes"):
        raise CompileError(f"the recipe {name!r} takes no options, found {text!r}", hint="write its passes out instead")
    made: type[Pass] = registry.lookup("passes", name)
    known = [f.name for f in dataclasses.fields(made)]
    try:
        return made(**_options(options, known))
    except (SyntaxError, ValueError, TypeError) as error:
        raise CompileError(
            f"cannot read the pass {text!r}: {error}", hint=f"write {name}(option=value, ...); its options are {known}"
        ) from error


def _options(text: str, known: Sequence[str]) -> dict[str, Any]:
    """Values by name of "a=1, b='x')"; raises ValueError or SyntaxError."""
    call = ast.parse(f"f({text}", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("found something else than options by name")
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise ValueError(f"there is no option {keyword.arg!r}")
        try:
            found[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError as error:
            value = ast.unparse(keyword.value)
            raise ValueError(f"{keyword.arg} is {value}, expected a number, True, False or a quoted text") from error
    return found


def expand(steps: Sequence[Step], program: Program, machine: Machine | None) -> Expansion:
    """Passes, notes and facts of all steps together; a recipe sees the program that the steps before it leave."""
    passes: list[Pass] = []
    notes: list[str] = []
    facts: dict[str, object] = {}
    done = 0
    for step in steps:
        if isinstance(step, Pass):
            passes.append(step)
            continue
        program = Pipeline(tuple(passes[done:]), check=False)(program) if passes[done:] else program
        expansion = step.expand(program, machine)
        done = len(passes)
        passes += expansion.passes
        notes += expansion.notes
        facts |= expansion.facts
    return Expansion(tuple(passes), tuple(notes), facts)
