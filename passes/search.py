"""model, budget -> passes: every part kept, dropped, shared or rounded, so that the least is lost within the budget.

Losses of single changes and measured costs make a table (Puzzle, Bercovich et al. 2024); a mixed-integer programme
chooses, an evolutionary search corrects it by the KL of whole models (EvoPress, Sieberling et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from sylvester.compiler.budget import Budget
from sylvester.compiler.calibration import Calibration, Sample, spread
from sylvester.compiler.errors import CompileError
from sylvester.compiler.next_token import language_model
from sylvester.compiler.pipeline import Pass
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.recipe import Expansion, Machine, Recipe
from sylvester.passes.rotate_hadamard import RotateHadamard
from sylvester.passes.search_evolve import Settings
from sylvester.passes.search_goal import Goal
from sylvester.passes.search_judge import Judge
from sylvester.passes.search_make import make_table
from sylvester.passes.search_result import Result, facts, notes
from sylvester.passes.search_solve import broken
from sylvester.passes.search_solve import solve as solve
from sylvester.passes.search_table import Table as Table
from sylvester.passes.search_world import World

WIDTHS = (16, 8, 4, 3)
TRIED = 4
"""Bits at which a rotation must pay."""
LEAST_GAIN = 0.02
"""Part of the KL that a rotation must take away: less is noise."""
FITTED = 16
"""Samples that trial weights are fitted to."""
LEAST = {"tokens": 2, "rounds": 0, "generations": 0, "offspring": 1, "distance": 0, "context": 1}
ATTEMPTS = 4
"""How often a budget is made tighter where what was built breaks it."""


@dataclass(frozen=True)
class Search(Recipe):
    """Chooses passes that keep `budget`.

    `tokens` of the calibration data score every choice; `rounds` of changes to the best model and `generations` of
    `offspring` refine it, these for at most `seconds` if that is given. Blocks may share the matrices of one up to
    `distance` before. `widths` are the bits that weights may have. Steps are timed with caches of `context` tokens.
    `seed` makes it repeatable.
    """

    name: str = "search"
    budget: Budget | None = None
    tokens: int = 4096
    rounds: int = 2
    generations: int = 20
    offspring: int = 16
    seconds: float | None = None
    distance: int = 1
    widths: tuple[int, ...] = WIDTHS
    context: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget is a {type(self.budget).__name__}, expected a Budget")
        for option, least in LEAST.items():
            found = getattr(self, option)
            if isinstance(found, bool) or not isinstance(found, int) or found < least:
                raise ValueError(f"{option} is {found!r}, expected a whole number from {least}")
        if not set(self.widths) <= set(WIDTHS):
            raise ValueError(f"widths are {self.widths!r}, expected some of {WIDTHS}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds!r}, expected more than 0")

    def __str__(self) -> str:
        return f"{self.name}({self.budget})"

    def summary(self) -> str:
        return "what each part of the model becomes, within a budget, by the KL of next tokens and measured costs"

    def expand(self, program: Program, machine: Machine | None) -> Expansion:
        began = perf_counter()
        budget = self.budget
        assert budget is not None
        samples = self._samples(program)
        worlds, told = self._worlds(program, samples)
        judge = Judge(worlds, samples)
        table = make_table(judge, program, machine, self.widths, self.distance, self.context)
        settings = Settings(self.generations, self.offspring, self.seconds, self.rounds)
        goal = Goal(table, judge, budget, settings, self.seed, self.widths)
        result = self._kept(goal, program, machine)
        result.seconds = perf_counter() - began
        return Expansion(result.passes, (*told, *notes(goal, result)), {"search": facts(goal, result)})

    def _samples(self, program: Program) -> tuple[Sample, ...]:
        """Evenly spread over the data to fit to."""
        model = language_model(program)
        if model is None:
            raise CompileError(
                "a budget is kept by the KL of next tokens, and the program scores none",
                hint="give a causal language model; for others choose passes, such as passes='w8a8'",
            )
        fit = program.calibration.fit if program.calibration else ()
        if not fit:
            raise CompileError("a budget needs calibration data", hint="compile(..., calibration=texts)")
        mean = sum(sample[model.tokens].numel() for sample in fit) / len(fit)
        count = min(len(fit), max(1, round(self.tokens / mean)))
        return spread(fit, count)

    def _worlds(self, program: Program, samples: Sequence[Sample]) -> tuple[list[World], list[str]]:
        """The program as it is, and rotated where that lowers the KL of narrow weights."""
        bare = program.clone()
        fit = program.calibration.fit if program.calibration else ()
        bare.calibration = Calibration(spread(fit, min(len(fit), FITTED)))
        plain = World.of(bare, "plain", ())
        plain.sites  # noqa: B018  (an error about the structure comes first)
        narrow = [bits for bits in self.widths if bits <= TRIED]
        if not narrow:
            return [plain], []
        report("try rotations", 0, 1)
        rotated = World.of(bare, "rotated", (RotateHadamard(),))
        trial = Judge([plain, rotated], samples)
        before, after = (trial.score(w.sites.genome(max(narrow), n)).mean for n, w in enumerate(trial.worlds))
        report("try rotations", 1, 1)
        kept = after < before * (1 - LEAST_GAIN)
        told = (
            f"search: rotation {'tried' if kept else 'rejected'}: KL {before:.3g} -> {after:.3g} at {max(narrow)} bits"
        )
        return ([plain, rotated] if kept else [plain]), [told]

    def _kept(self, goal: Goal, program: Program, machine: Machine | None) -> Result:
        """What is built keeps the budget too; a measured time may miss it, by what the notes say."""
        best: Result | None = None
        for _ in range(ATTEMPTS):
            genome = goal.reach()
            passes: tuple[Pass, ...] = goal.judge.worlds[genome.world].realise(genome)
            result = Result.measured(goal, genome, passes, program, machine)
            best = result if best is None or sum(result.over.values()) < sum(best.over.values()) else best
            if not result.over or not goal.tighten(result.over):
                break
        assert best is not None
        if any(name != "latency" for name in best.over):
            raise broken(goal.budget, best.found)
        return best
