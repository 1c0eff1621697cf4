"""What tests of the search share: toy tables, all genomes of one by enumeration, a small model with its own data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from random import Random

import torch

import sylvester as sv
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.genome import DROPPED, FLOAT, Genome
from sylvester.compiler.program import Program
from sylvester.passes.search_table import Layer, Loss, Option, Place, Table, WorldTable
from tests import zoo


def toy(layers: int = 3, seed: int = 0, bits: tuple[int, ...] = (32, 8, 0), share: bool = True) -> Table:
    """Random losses; costs by bits."""
    random = Random(seed)

    def option(b: int) -> Option:
        score = 0.0 if b == FLOAT else random.random() * (3.0 if b == DROPPED else 1.0)
        return Option(b, score, score, 0.0 if b == DROPPED else 3.0 * b, b / 32, 5.0 if b else 0.0)

    def place(name: str, droppable: bool = True) -> Place:
        return Place(name, 10.0, tuple(option(b) for b in bits if b or droppable))

    made = []
    for i in range(layers):
        losses = [random.random()] if share and i else []
        made.append(Layer((place(f"a {i}"), place(f"f {i}")), tuple(Loss(n, n) for n in losses)))
    world = WorldTable("plain", 50.0, 2.0, 7.0, (place("head", droppable=False),), tuple(made))
    return Table("toy", True, 10.0, 128, 1.0, (world,))


def every_genome(table: Table) -> Iterator[Genome]:
    """All legal ones of the first world."""
    world = table.worlds[0]
    outer = [[option.bits for option in place.options] for place in world.outer]
    blocks = [
        list(itertools.product(*[[option.bits for option in place.options] for place in layer.places]))
        for layer in world.layers
    ]
    shares = [range(len(layer.shared) + 1) for layer in world.layers]
    for head, parts, distances in itertools.product(
        itertools.product(*outer), itertools.product(*blocks), itertools.product(*shares)
    ):
        pairs = enumerate(distances)
        if all(not d or (distances[i - 1] == d - 1 and parts[i] == parts[i - 1] and all(parts[i])) for i, d in pairs):
            yield Genome(head, parts, distances)


@functools.cache
def language_model(name: str = "llama-tied", samples: int = 4, tokens: int = 24) -> Program:
    """A model of the zoo, with texts of its own making; not to be edited in place."""
    case = zoo.case(name)
    program = sv.trace(case.model, case.inputs)
    program.calibration = Calibration(tuple({"input_ids": row[None]} for row in own_text(name, samples, tokens)))
    return program


def own_text(name: str, samples: int, tokens: int) -> torch.Tensor:
    """Ids [samples, tokens] that the model draws itself: it predicts them better than by guessing."""
    model = zoo.case(name).model
    torch.manual_seed(0)
    ids = torch.randint(3, zoo.VOCAB, (samples, 1))
    with torch.no_grad():
        while ids.shape[1] < tokens:
            scores = 4 * model(input_ids=ids).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1)], 1)
    return ids
