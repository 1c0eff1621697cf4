"""Names, recipes and passes as given -> passes; a recipe chooses its passes when the program is known."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence

from sylvester.compiler import registry
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.recipe import Recipe, Speed

Step = Pass | Recipe


def resolve_passes(passes: str | Step | Sequence[str | Step]) -> tuple[Step, ...]:
    """Instances for names, recipes and instances; an unknown name is an error that names the nearest ones."""
    given = [passes] if isinstance(passes, (str, Pass, Recipe)) else list(passes)
    return tuple(step for p in given for step in (_named(p) if isinstance(p, str) else (p,)))


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
    if given:
        return (_configured(name, options, text),)
    if name in registry.table("recipes"):
        recipe: Recipe | tuple[Pass, ...] = registry.lookup("recipes", name)
        return (recipe,) if isinstance(recipe, Recipe) else recipe
    return (registry.lookup("passes", name)(),)


def _configured(name: str, options: str, text: str) -> Pass:
    made: type[Pass] = registry.lookup("passes", name)
    known = [f.name for f in dataclasses.fields(made)]
    try:
        call = ast.parse(f"f({options}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg not in known for k in call.keywords):
            raise ValueError("found something else than options by name")
        return made(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, ValueError, TypeError) as error:
        raise CompileError(
            f"cannot read the pass {text!r}: {error}", hint=f"write {name}(option=value, ...); its options are {known}"
        ) from error


def expand(steps: Sequence[Step], program: Program, speed: Speed | None) -> tuple[tuple[Pass, ...], list[str]]:
    """Passes for all steps, and what recipes have to say; a recipe sees the program that the steps before it leave."""
    passes: list[Pass] = []
    notes: list[str] = []
    done = 0
    for step in steps:
        if isinstance(step, Pass):
            passes.append(step)
            continue
        program = Pipeline(tuple(passes[done:]), check=False)(program) if passes[done:] else program
        expansion = step.expand(program, speed)
        done = len(passes)
        passes += expansion.passes
        notes += expansion.notes
    return tuple(passes), notes
