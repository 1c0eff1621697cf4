"""A few steps of training on a Program itself, to win back what skipping, sharing and removing lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sylvester.compiler.batches import PARTS, Batches, windows
from sylvester.compiler.calibration import Calibration, Sample
from sylvester.compiler.descent import Descent, Loss, workers
from sylvester.compiler.differentiable import CPU
from sylvester.compiler.errors import CompileError
from sylvester.compiler.finished import samples_sum
from sylvester.compiler.objectives import Imitate, NextToken, Regress, Teacher
from sylvester.compiler.program import Program
from sylvester.compiler.progress import Progress, silent
from sylvester.compiler.samples import listed, read
from sylvester.compiler.student import Student, trainable
from sylvester.compiler.training_run import Run
from sylvester.compiler.training_state import Checkpoint, program_sum

WINDOW, BATCH, RATE = 256, 8, 1e-3


def finetune(
    program: Program,
    data: Iterable[Any] | Calibration,
    steps: int,
    *,
    teacher: Program | None = None,
    learning_rate: float = RATE,
    batch: int = BATCH,
    window: int = WINDOW,
    seed: int = 0,
    weights: str | Sequence[str] = "all",
    embeddings: bool = False,
    tail: float = 0.0,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Program:
    """The program with weights trained on `data` (what `calibration` takes) for so many steps; itself it stays.

    With `teacher`, the program before it was changed, a language model learns its next-token distributions, and with
    `tail` > 0 also the direction of its last hidden state (weight of 1 - cosine); other programs learn its float
    outputs (mean squared error over mean square). Without, a language model learns the next token of the data.

    A step takes `batch` windows of `window` tokens, or as many samples. `weights` is "all" or patterns of keys, such
    as "*mlp*"; tables that tokens are looked up in are trained with `embeddings` only, quantised layers never. AdamW,
    3 % warm-up, then a cosine. The order of the data depends on `seed`. `device` is one of PyTorch's: "cpu", with all
    threads that it may use, or "cuda".

    `checkpoint` is a folder: the state is written every minute and on Ctrl-C, and the same call goes on from it, on
    the CPU with the same result. `progress` is told the loss and the tokens per second. `CompileError` when the data is
    empty, the teacher answers in another form, the loss is no finite number, PyTorch has no such device, or the
    folder holds another run.
    """
    for name, given in (("program", program), ("teacher", teacher)):
        if not isinstance(given, Program) and (given is not None or name == "program"):
            raise TypeError(f"{name} is a {type(given).__name__}, expected a Program: sylvester.trace gives one")
    options = _checked(steps=steps, batch=batch, window=window, learning_rate=learning_rate, tail=tail)
    student = Student(program, tail=tail > 0, device=_device(device))
    samples = windows(program, _samples(program, data), window)
    if not samples:
        raise CompileError("the data has no window of at least 3 tokens", hint="give more text")
    patterns = (weights,) if isinstance(weights, str) else tuple(weights)
    choice = trainable(student, patterns, embeddings)
    parts = min(PARTS, batch) if student.device == CPU else 1
    batches = Batches(program, samples, batch, seed, parts)
    loss = _objective(student, teacher, tail, repeats=steps * batch > len(samples))
    about = {name: str(value) for name, value in options.items()} | {
        "seed": str(seed), "weights": repr(patterns), "embeddings": str(embeddings), "program": program_sum(program),
        "data": samples_sum(samples), "teacher": program_sum(teacher) if teacher else "none",
    }  # fmt: skip
    kept = Checkpoint(Path(checkpoint), about) if checkpoint is not None else None
    descent = Descent({key: student.own[key] for key in choice.keys}, steps, learning_rate)
    run = Run(descent, _typed(student, loss), batches, kept, progress or silent)
    run.resume()
    with workers(parts) as pool:
        run.finish(pool)
    trained = program.clone()
    for key, tensor in descent.weights.items():
        trained.weights[key] = tensor.to("cpu", program.weights[key].dtype)
    known = trained.info.setdefault("notes", [])
    known += [f"fine-tuning: {note}" for note in (*choice.notes, *run.notes())]
    return trained


def _checked(**numbers: float) -> dict[str, float]:
    for name, found in numbers.items():
        least = {"steps": 1, "batch": 1, "window": 3, "learning_rate": 0.0, "tail": 0.0}[name]
        whole = name in ("steps", "batch", "window")
        if isinstance(found, bool) or not isinstance(found, int if whole else (int, float)):
            raise TypeError(f"{name} is a {type(found).__name__}, expected {'a whole number' if whole else 'a number'}")
        if not math.isfinite(found) or found < least or (name == "learning_rate" and found == 0):
            bound = "more than" if name == "learning_rate" else "at least"
            raise ValueError(f"{name} is {found}, expected {bound} {least}")
    return numbers


def _samples(program: Program, data: Iterable[Any] | Calibration) -> tuple[Sample, ...]:
    given = listed(data, "data")
    if given is None:
        raise CompileError("there is no data", hint="give texts, token ids, or inputs of the model")
    return read(program, list(given.fit) if isinstance(given, Calibration) else given, "data")


def _objective(student: Student, teacher: Program | None, tail: float, repeats: bool) -> Loss:
    if teacher is None and student.model is None:
        raise CompileError(
            "the program scores no next token: there is nothing to learn without a teacher",
            hint="give teacher=, the program before it was changed",
        )
    if tail and (teacher is None or student.model is None):
        raise CompileError("tail needs a teacher that is a language model: it is about its last hidden state")
    if teacher is None:
        return NextToken(student)
    answers = Teacher.of(teacher, student, tail > 0)
    answers.keep = repeats
    return Imitate(student, answers, tail) if student.model else Regress(student, answers)


def _device(name: str) -> torch.device:
    """`CompileError` when PyTorch has no such device."""
    if not isinstance(name, str):
        raise TypeError(f"device is a {type(name).__name__}, expected the name of a device, such as 'cuda'")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise CompileError(f"PyTorch has no device {name!r}: {reason}", hint="'cpu' is always there") from error


def _typed(student: Student, loss: Loss) -> Loss:
    """The loss at the weights that are trained, in their own types, and all the others."""

    def found(weights: Any, part: Any) -> Any:
        own = {key: tensor.to(student.own[key].dtype) for key, tensor in weights.items()}
        return loss(student.own | own, part)

    return found
