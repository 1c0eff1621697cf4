"""The option `draft` of compile: the passes that make what drafts, what chooses its parts, whether n-grams draft."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sylvester.compiler import registry
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pass
from sylvester.compiler.program import Program
from sylvester.compiler.recipe import Machine, Recipe
from sylvester.compiler.resolve import Step, expand, not_a_step, resolve_passes, separated

PASS, NGRAM, TREE = "sylvester.passes.draft:Draft", "ngram", "tree"
"""The pass that adds the draft, and what names n-grams, and trees of drafts, among its steps."""
CHOOSERS = ("swift", "exit")
"""What finds the parts that the draft skips while generating: SWIFT's search, or an exit by DEL."""
WORDS = (NGRAM, TREE, *CHOOSERS)


@dataclass(frozen=True)
class DraftOption:
    """Parsed, but for recipes, which choose their passes when the program is known."""

    steps: tuple[Step, ...]
    ngram: bool
    chooses: str = ""
    tree: bool = False

    @staticmethod
    def parse(given: str | Step | Sequence[str | Step]) -> DraftOption:
        items = [given] if isinstance(given, (str, Pass, Recipe)) or not isinstance(given, Iterable) else list(given)
        parts = [part for item in items for part in _parts(item)]
        if "" in parts or all(part == TREE for part in parts):
            hint = "give passes such as 'quantize(weights=4)', 'swift', 'exit' or 'ngram'"
            raise CompileError("draft names nothing that drafts", hint=hint)
        choosers = [word for word in CHOOSERS if word in parts]
        if len(choosers) > 1:
            raise CompileError(f"draft has {' and '.join(choosers)}, which choose the same parts", hint="give one")
        steps = tuple(step for part in parts if part not in WORDS for step in _steps(part))
        return DraftOption(steps, NGRAM in parts, "".join(choosers), TREE in parts)

    def expand(self, program: Program, machine: Machine | None) -> Pass:
        """The pass that adds the draft to the program as it is."""
        passes = expand(self.steps, program, machine).passes
        made: Pass = registry.resolve(PASS)(passes, self.ngram, self.chooses, self.tree)
        return made


def _parts(item: str | Step) -> list[str | Step]:
    if isinstance(item, str):
        return [*separated(item)] or [""]
    if not isinstance(item, (Pass, Recipe)):
        raise not_a_step("draft holds", item, none="None")
    return [item]


def _steps(part: str | Step) -> tuple[Step, ...]:
    """What a part stands for, without a pass that adds a draft itself."""
    try:
        found = resolve_passes(part)
    except CompileError as error:
        word = part.partition("(")[0].lower() if isinstance(part, str) else ""
        close = difflib.get_close_matches(word, WORDS, 1, 0.7)
        if close:
            raise CompileError(error.message, hint=f"did you mean {close[0]!r}?") from error
        raise
    for step in found:
        if isinstance(step, Pass) and step.contract == "drafted":
            hint = "give its steps here, or the pass itself among `passes`"
            raise CompileError(f"draft holds {step}, which adds a draft itself", hint=hint)
    return found
