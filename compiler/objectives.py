"""What a fine-tuned program is asked to do: predict the next token, or answer as its teacher does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.batches import Part
from sylvester.compiler.differentiable import TAIL
from sylvester.compiler.errors import CompileError
from sylvester.compiler.next_token import LanguageModel
from sylvester.compiler.program import Program, value
from sylvester.compiler.student import Answer, Student

ROOM = 1 << 30
"""Bytes of a teacher's answers that are kept for the next time."""
TINY = 1e-12


@dataclass(frozen=True)
class NextToken:
    """-log p(next token): the mean over the tokens that follow another."""

    student: Student

    def __call__(self, weights: Mapping[str, Tensor], part: Part) -> Tensor:
        model = cast(LanguageModel, self.student.model)
        answer = self.student(weights, part.sample, part.turn)
        scores = answer.values[model.scores][:, :-1].flatten(0, 1)
        wanted = part.sample[model.tokens][:, answer.first + 1 :].flatten().to(scores.device)
        if answer.seen is not None:
            seen = (answer.seen[:, :-1] & answer.seen[:, 1:]).flatten()
            scores, wanted = scores[seen], wanted[seen]
        return part.share * F.cross_entropy(scores, wanted)


@dataclass(frozen=True)
class Imitate:
    """KL(teacher || student) of next tokens + `tail` (1 - cosine of what the last matrix reads)."""

    student: Student
    teacher: Teacher
    tail: float = 0.0

    def __call__(self, weights: Mapping[str, Tensor], part: Part) -> Tensor:
        model = cast(LanguageModel, self.student.model)
        answer, wanted = self.student(weights, part.sample, part.turn), self.teacher(part)
        new = _log_softmax(answer.values[model.scores], answer)
        old = _log_softmax(wanted[model.scores][:, answer.first :], answer)
        loss = F.kl_div(new, old, reduction="sum", log_target=True) / len(new)
        if self.tail:
            far = 1 - F.cosine_similarity(cast(Tensor, answer.tail), wanted[TAIL][:, answer.first :], dim=-1)
            loss = loss + self.tail * (far if answer.seen is None else far[answer.seen]).mean()
        return part.share * loss


@dataclass(frozen=True)
class Regress:
    """The mean over all float outputs of |student - teacher|^2 / |teacher|^2."""

    student: Student
    teacher: Teacher

    def __call__(self, weights: Mapping[str, Tensor], part: Part) -> Tensor:
        found, wanted = self.student(weights, part.sample, part.turn).values, self.teacher(part)
        errors = [(found[n] - wanted[n]).square().sum() / wanted[n].square().sum().clamp_min(TINY) for n in found]
        return part.share * torch.stack(errors).mean()


def _log_softmax(scores: Tensor, answer: Answer) -> Tensor:
    """Log-probabilities [positions that count, vocabulary]."""
    rows = scores.flatten(0, 1) if answer.seen is None else scores[answer.seen]
    return F.log_softmax(rows.float(), -1)


@dataclass
class Teacher:
    """Answers of the original program. Samples are run one by one, so that an answer does not depend on its batch."""

    student: Student
    keep: bool = False
    _kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _bytes: int = 0

    @staticmethod
    def of(program: Program, student: Student, tail: bool = False) -> Teacher:
        """`CompileError` when it does not answer in the same form."""
        _check(program, student)
        return Teacher(Student(program, tail, False, student.device))

    def __call__(self, part: Part) -> dict[str, Tensor]:
        rows = next(iter(part.sample.values())).shape[0] // len(part.numbers) if len(part.numbers) > 1 else 0
        found = [self._answer(n, i, rows, part) for i, n in enumerate(part.numbers)]
        return {name: torch.cat([answer[name] for answer in found]) for name in found[0]} if rows else found[0]

    def _answer(self, number: int, place: int, rows: int, part: Part) -> dict[str, Tensor]:
        if number in self._kept:
            return self._kept[number]
        sample = {n: t[place * rows : (place + 1) * rows] for n, t in part.sample.items()} if rows else part.sample
        with torch.no_grad():
            answer = self.student(self.student.own, sample, part.turn)
        found = answer.values if answer.tail is None else answer.values | {TAIL: answer.tail}
        size = sum(t.numel() * t.element_size() for t in found.values())
        if self.keep and self._bytes + size <= ROOM:
            self._bytes += size
            self._kept[number] = found
        return found


def _check(program: Program, student: Student) -> None:
    facts = [_outputs(p, student.names) for p in (program, student.program)]
    if facts[0] != facts[1]:
        raise CompileError(
            f"the teacher gives {facts[0]}, the program {facts[1]}", hint="the teacher is the program before it changed"
        )


def _outputs(program: Program, names: list[str]) -> dict[str, str]:
    """Type and fixed sizes of the outputs by name."""
    pairs = zip(program.main.outputs, program.main.results(), strict=True)
    facts = {output.name: value(node) for output, node in pairs if output.name in names}
    return {
        name: f"{str(fact.dtype).removeprefix('torch.')}{[n if isinstance(n, int) else '?' for n in fact.shape]}"
        for name, fact in facts.items()
    }
