"""W -> W - sum of steps against the gradient of -log p(next token): a cure for what the passes before it lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.finetune import BATCH, RATE, WINDOW, finetune
from sylvester.compiler.next_token import language_model
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.quality import perplexity


@dataclass(frozen=True)
class Finetune(Pass):
    """Trains a language model on the calibration data, in front of passes that round its weights.

    A pass does not see the program that others began with: `sylvester.finetune(..., teacher=)` does, and needs less
    data. Options are those of `sylvester.finetune`.
    """

    name: ClassVar[str] = "finetune"
    contract: ClassVar[Contract] = "lossy"
    steps: int = 100
    learning_rate: float = RATE
    batch: int = BATCH
    window: int = WINDOW
    seed: int = 0
    device: str = "cpu"

    def requires(self, program: Program) -> None:
        if language_model(program) is None:
            raise CompileError("the program scores no next token", hint="sylvester.finetune takes a teacher instead")
        if program.calibration is None:
            raise CompileError("there is no data to train on", hint="give calibration=")

    def run(self, program: Program) -> Changes:
        data = program.calibration
        assert data is not None
        trained = finetune(
            program, data, self.steps, learning_rate=self.learning_rate, batch=self.batch, window=self.window,
            seed=self.seed, device=self.device, progress=report,
        )  # fmt: skip
        before, after = (perplexity(p, data.fit) for p in (program, trained))
        changes = Changes()
        for key in list(program.weights):
            if trained.weights[key] is not program.weights[key]:
                program.weights[key] = trained.weights[key]
                changes.apply("train", key)
        changes.note(f"perplexity on the data it trained on: {before:.4g} -> {after:.4g}")
        for note in trained.info["notes"][len(program.info.get("notes", [])) :]:
            changes.note(note)
        return changes
