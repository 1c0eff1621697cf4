"""Which layers go: one after the other, each time the one without which the model that is left predicts best.

Unlike a ranking of single layers this sees what the layers gone already have done to the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sylvester.compiler.calibration import Sample, spread
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer, find_layers
from sylvester.compiler.next_token import language_model
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.quality import drift, perplexity
from sylvester.passes.depth import Depth

SAMPLES = 8
"""Of the calibration data, spread over it, that every trial runs on."""
LOSS = "loss once it is gone"
STAGE = "try to leave out layers"


def least_missed(program: Program, layers: Sequence[Layer], count: int) -> Iterator[tuple[Layer, float]]:
    """`count` of the layers in the order in which they go, with the loss once they have gone.

    The loss is the perplexity, or for another model the largest relative error of an output.
    """
    data = program.calibration
    if data is None or not data.fit:
        raise CompileError("layers are tried on calibration data, found none", hint="compile(..., calibration=texts)")
    samples = spread(data.fit, min(SAMPLES, len(data.fit)))
    gone: list[Layer] = []
    trials, done = sum(len(layers) - n for n in range(count)), 0
    for _ in range(count):
        losses: dict[int, float] = {}
        for layer in layers:
            if layer not in gone:
                report(STAGE, done, trials)
                losses[layer.index] = _loss(program, [*gone, layer], samples)
                done += 1
        best = min((layer for layer in layers if layer.index in losses), key=lambda layer: losses[layer.index])
        gone.append(best)
        yield best, losses[best.index]


def _loss(program: Program, gone: Sequence[Layer], samples: Sequence[Sample]) -> float:
    trial = program.clone()
    layers, numbers = find_layers(trial), {layer.index for layer in gone}
    depth = Depth(trial, layers, "all", Changes())
    depth.drop_layers([layer for layer in layers if layer.index in numbers])
    depth.settle()
    trial.sweep()
    if language_model(program):
        return perplexity(trial, samples)
    return max((d.error for d in drift(program, trial, samples)), default=0.0)
