"""decode -> decode, draft: a cheaper copy of `decode` that proposes tokens, which the untouched one verifies.

The copy is what lossy passes make of it. It reads the caches of the model, and writes what it drafts behind them, where
verification writes again: skipped layers, quantised substitutes (Wang et al., SubSpec, 2025). Which layers it skips may
also be chosen while generating, by SWIFT (Xia et al., 2025) or DEL (Zarch et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from sylvester.compiler.changes import Changes
from sylvester.compiler.cost import entry_cost
from sylvester.compiler.draft_option import CHOOSERS
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.ledger import Ledger
from sylvester.compiler.pipeline import Contract, Pass, Pipeline
from sylvester.compiler.program import Binding, Entry, Output, Program, binding
from sylvester.compiler.stages import DRAFT, SKIPS, TREE
from sylvester.compiler.steady import unsteady
from sylvester.passes.draft_tree import add_tree
from sylvester.passes.skippable_parts import SkippableParts

DECODE = "decode"


@dataclass(frozen=True)
class Draft(Pass):
    """Adds an entry `draft`, made by `steps`; with `ngram`, what was read before proposes tokens too.

    `chooses` "swift" or "exit": generation looks for the parts that the entry skips, or for the layer that it ends at.
    `tree` adds an entry that reads several continuations of a single row together.

    `Unsupported` where tokens that are read together would not have the bits of tokens read one by one, and where a
    step changes what caches hold.
    """

    name: ClassVar[str] = "draft"
    contract: ClassVar[Contract] = "drafted"
    steps: tuple[Pass, ...] = ()
    ngram: bool = False
    chooses: str = ""
    tree: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.steps, tuple) or not all(isinstance(step, Pass) for step in self.steps):
            raise TypeError(f"steps is {self.steps!r}, expected a tuple of passes")
        for option, switch in (("ngram", self.ngram), ("tree", self.tree)):
            if not isinstance(switch, bool):
                raise TypeError(f"{option} is {switch!r}, expected True or False")
        if self.chooses not in ("", *CHOOSERS):
            raise ValueError(f"chooses is {self.chooses!r}, expected one of {list(CHOOSERS)}, or ''")
        if not self.steps and not self.ngram and not self.chooses:
            raise ValueError("nothing drafts: give steps, chooses='swift' or 'exit', or ngram=True")

    def __str__(self) -> str:
        words = (self.chooses, "ngram" if self.ngram else "", "tree" if self.tree else "")
        parts = [*map(str, self.steps), *filter(None, words)]
        return f"draft({', '.join(parts)})"

    def requires(self, program: Program) -> None:
        if DECODE not in program.entries:
            raise Unsupported(f"drafting needs an entry 'decode', the program has {list(program.entries)}")
        if DRAFT in program.info:
            raise CompileError("the program drafts already", hint="give all that drafts in one pass")
        refusal = unsteady(program)
        if refusal:
            raise Unsupported(f"drafts cannot be verified together: {refusal.reason}", at=refusal.at)

    def run(self, program: Program) -> Changes:
        changes = Changes()
        steps = (*self.steps, *([SkippableParts()] if self.chooses else []))
        if steps:
            self._add_entry(program, steps, changes)
        if self.ngram:
            changes.apply("ngram", DECODE)
        tree = TREE if self.tree and self._add_tree(program, changes) else ""
        program.info[DRAFT] = program.info.get(DRAFT, {}) | {"ngram": self.ngram, "tree": tree}
        return changes

    def _add_tree(self, program: Program, changes: Changes) -> bool:
        refusal = add_tree(program)
        if refusal is None:
            changes.apply("tree", TREE)
            return True
        changes.refuse("tree", refusal)
        changes.note("drafts are chains of tokens")
        return False

    def _add_entry(self, program: Program, steps: tuple[Pass, ...], changes: Changes) -> None:
        cheaper, ledger = Pipeline(steps, check=False).run(program)
        entry = cheaper.entries[DECODE]
        _keep_slots(program, cheaper, entry, _names(program, ledger))
        shared, new = _add_weights(program, cheaper, entry)
        program.entries[DRAFT] = entry
        parts = cheaper.info.get(SKIPS, ())
        layers, kinds = [layer for layer, _ in parts], [kind for _, kind in parts]
        _require_layers(self.chooses, layers)
        program.info[DRAFT] = {"entry": DRAFT, "chooses": self.chooses, "layers": layers, "kinds": kinds}
        changes.apply("entry", DRAFT)
        changes.note(f"drafting shares {shared} weights with the model and has {new} of its own")
        changes.note(_work(program))
        for row in ledger.rows:
            changes.refused += row.changes.refused


def _require_layers(chooses: str, layers: Sequence[int]) -> None:
    """SWIFT keeps the first and the last layer, and an exit comes after one."""
    least, found = {"swift": 3, "exit": 2}.get(chooses, 0), len(set(layers))
    if found < least:
        raise Unsupported(f"drafting by {chooses} needs {least} layers with parts to skip, the model has {found}")


def _work(program: Program) -> str:
    """What a token takes by what drafts, beside one by the model."""
    draft, decode = (entry_cost(program.entries[name]) for name in (DRAFT, DECODE))
    skipped = ", with no part skipped" if program.info[DRAFT]["chooses"] else ""
    return (
        f"drafting moves {draft.bytes / 1e6:.2f} MB where decoding moves {decode.bytes / 1e6:.2f} MB, "
        f"{draft.flops / 1e6:.2f} Mflop where it takes {decode.flops / 1e6:.2f}, on the example{skipped}"
    )


def _names(program: Program, ledger: Ledger) -> dict[str, str]:
    """Slot of the cheaper program -> slot of the program; `Unsupported` where they hold different things."""
    names = {key: key for key in program.state}
    for row in ledger.rows:
        if row.changes.bases:
            slot = sorted(row.changes.bases)[0]
            raise Unsupported(
                f"{row.text} changes what the cache {slot!r} holds, which drafting shares with the model",
                hint="draft with passes that leave caches alone, such as quantize(weights=4) or skip-layers",
            )
        if row.changes.renamed:
            names = {row.changes.renamed[new]: old for new, old in names.items() if new in row.changes.renamed}
    return names


def _keep_slots(program: Program, cheaper: Program, entry: Entry, names: Mapping[str, str]) -> None:
    """The entry reads and writes the slots of the program."""
    for key in {binding(node).key for node in entry.placeholders("state")}:
        old, new = program.state[names[key]], cheaper.state[key]
        if old.dtype != new.dtype or list(map(str, old.shape)) != list(map(str, new.shape)):
            raise Unsupported(
                f"the draft has caches of {new.dtype}{list(new.shape)}, the model of {old.dtype}{list(old.shape)}",
                hint="put quantize-cache among the passes of the model: drafting shares its caches",
            )
    for node in entry.placeholders("state"):
        node.meta["bind"] = Binding("state", names[binding(node).key])
    pairs = list(zip(entry.outputs, entry.results(), strict=True))
    kept = [(_renamed(o, names), n) for o, n in pairs if o.kind == "output" or not _untouched(n)]
    entry.outputs = [output for output, _ in kept]
    entry.graph.output_node().args = (tuple(node for _, node in kept),)
    entry.sweep()


def _renamed(output: Output, names: Mapping[str, str]) -> Output:
    return output if output.kind == "output" else Output("state", names[output.name])


def _untouched(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _add_weights(program: Program, cheaper: Program, entry: Entry) -> tuple[int, int]:
    """How many weights are the program's own, and how many were added to it."""
    shared = new = 0
    for node in entry.placeholders("weight"):
        key = binding(node).key
        tensor = cheaper.weights[key]
        if key in program.weights and program.weights[key] is tensor:
            shared += 1
            continue
        fresh = program.weights.fresh(f"draft.{key}")
        program.weights[fresh] = tensor
        node.meta["bind"] = Binding("weight", fresh)
        new += 1
    return shared, new
