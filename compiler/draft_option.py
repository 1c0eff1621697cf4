"""The option `draft` of compile: the passes that make what drafts, and whether n-grams draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sylvester.compiler import registry
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Pass
from sylvester.compiler.program import Program
from sylvester.compiler.recipe import Machine
from sylvester.compiler.resolve import Step, expand, resolve_passes, separated

PASS, NGRAM = "sylvester.passes.draft:Draft", "ngram"
"""The pass that adds the draft, and what names n-grams among its steps."""


@dataclass(frozen=True)
class DraftOption:
    """Parsed, but for recipes, which choose their passes when the program is known."""

    steps: tuple[Step, ...]
    ngram: bool

    @staticmethod
    def parse(given: str | Step | Sequence[str | Step]) -> DraftOption:
        items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        texts = [part for item in items for part in (separated(item) or [item] if isinstance(item, str) else [item])]
        if not texts or "" in texts:
            hint = "give passes such as 'quantize(weights=4)', or 'ngram'"
            raise CompileError("draft names nothing that drafts", hint=hint)
        return DraftOption(resolve_passes([part for part in texts if part != NGRAM]), NGRAM in texts)

    def expand(self, program: Program, machine: Machine | None) -> Pass:
        """The pass that adds the draft to the program as it is."""
        made: Pass = registry.resolve(PASS)(expand(self.steps, program, machine).passes, self.ngram)
        return made
