"""y = x + g f(x): the gates that are left of blocks when every gate costs and none may stay between 0 and 1 (FoldGPT).

All weights are frozen. The gates start at 1 and learn, on calibration data, to give the outputs of the program with

    loss + price * sum |g| + push * sum g (1 - g),    0 <= g <= 1,

so that blocks compete: unlike scores of one block at a time, gates see what others have given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sylvester.compiler.batches import PARTS, Batches, Part, windows
from sylvester.compiler.descent import Descent, Loss, workers
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer
from sylvester.compiler.objectives import Imitate, Regress, Teacher
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.student import Student

GATE_STEPS = 40
BATCH, WINDOW = 4, 128
RATE = 0.05
PRICE, PUSH = 0.02, 0.01
"""Of a gate, in units of the loss; the push grows from 0 to this over the steps."""
STAGE = "learn gates of blocks"


def gated(program: Program, layers: Sequence[Layer]) -> tuple[Program, list[str]]:
    """A copy whose main entry has a gate on each layer, a weight of its own, and the keys of these.

    A layer gives a stream of the shape and type that it takes.
    """
    copy = program.clone()
    nodes = {node.name: node for node in copy.main.graph.nodes}
    keys = []
    for layer in layers:
        start, end = nodes[layer.main.start.name], nodes[layer.main.end.name]
        keys.append(copy.weights.fresh(f"gate.{layer.index}"))
        copy.weights[keys[-1]] = torch.ones((), dtype=end.meta["val"].dtype)
        gate = copy.main.bind("weight", keys[-1], copy.weights[keys[-1]])
        users = list(end.users)
        mixed = copy.main.emit(torch.ops.aten.lerp.Tensor, start, end, gate, before=end.next, made_by="share-blocks")
        for user in users:
            user.replace_input_with(end, mixed)
    return copy, keys


def gates(program: Program, layers: Sequence[Layer], steps: int, seed: int) -> list[float]:
    """|g| of each layer after training; needs calibration data."""
    data = program.calibration
    if data is None or not data.fit:
        raise CompileError("gates are trained on calibration data, found none", hint="compile(..., calibration=texts)")
    copy, keys = gated(program, layers)
    student = Student(copy, staged=False)
    samples = windows(copy, data.fit, WINDOW)
    teacher = Teacher.of(program, student)
    teacher.keep = steps * BATCH > len(samples)
    aim = Imitate(student, teacher) if student.model else Regress(student, teacher)
    batches = Batches(copy, samples, BATCH, seed)
    descent = Descent({key: copy.weights[key] for key in keys}, steps, RATE)
    with workers(PARTS) as pool:
        for step in range(steps):
            report(STAGE, step, steps)
            value = descent.gradient(_priced(aim, copy, step / steps), batches.at(step), pool)
            if not torch.isfinite(torch.tensor(value)):
                raise CompileError(f"the loss is {value} at step {step + 1} of training gates")
            descent.step()
            for gate in descent.weights.values():
                gate.clamp_(0, 1)
    return [float(gate) for gate in descent.weights.values()]


def _priced(aim: Loss, program: Program, progress: float) -> Loss:
    def loss(weights: Any, part: Part) -> Tensor:
        every = torch.stack(list(weights.values()))
        cost = PRICE * every.abs().sum() + PUSH * progress * (every * (1 - every)).sum()
        return aim(dict(program.weights) | dict(weights), part) + part.share * cost

    return loss
