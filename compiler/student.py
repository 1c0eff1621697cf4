"""What a program computes on a sample as a function of its weights: what is trained, and what it learns from.

The scores of a language model whose `decode` does other work than `prefill` are those of generation: the first part
of a window goes through `prefill`, the rest through `decode` and the caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calibration import Sample
from sylvester.compiler.dataflow import Dataflow, reached
from sylvester.compiler.differentiable import CPU, TAIL, Function
from sylvester.compiler.errors import CompileError
from sylvester.compiler.next_token import MASK, LanguageModel, empty_state, language_model
from sylvester.compiler.parts import is_weighted
from sylvester.compiler.program import Entry, Program, binding, is_weight, value
from sylvester.compiler.stages import spans, stages_of

aten = torch.ops.aten
PREFILL = "prefill"
PREFIXES = (8, 4, 2)
"""One part of so many of a window is the prompt, in turns."""
ROUNDED = "caches are rounded: what decoding reads from them teaches nothing to the layers that wrote it"


@dataclass(frozen=True)
class Answer:
    """Outputs by name, without the prompt; `tail` is what the last matrix reads, `seen` which positions count."""

    values: dict[str, Tensor]
    tail: Tensor | None = None
    seen: Tensor | None = None
    first: int = 0


class Student:
    """Runs the entries of a program on `device`, with other weights than its `own`."""

    def __init__(
        self, program: Program, tail: bool = False, staged: bool | None = None, device: torch.device = CPU
    ) -> None:
        self.program, self.device = program, device
        self.model = language_model(program)
        self.staged = generates_otherwise(program) if staged is None else staged
        self.names = [self.model.scores] if self.model else float_outputs(program.main)
        entries = {n: program.entries[n] for n in (PREFILL, *_decoders(program))} if self.staged else {}
        self.functions = {
            name: Function.of(
                entry, [*([] if name == PREFILL else self.names), *program.state], self._asked(entry, tail), device
            )
            for name, entry in entries.items()
        }
        self.main = Function.of(program.main, self.names, self._asked(program.main, tail), device)
        self.own = {key: program.weights[key].to(device) for key in self.weights}

    def _asked(self, entry: Entry, tail: bool) -> fx.Node | None:
        return self._tail(entry) if tail else None

    def _tail(self, entry: Entry) -> fx.Node:
        node = entry.result(self.names[0])
        while not is_weighted(node):
            operands = [n for n in node.all_input_nodes if isinstance(value(n), Tensor) and not is_weight(n)]
            if len(operands) != 1 or operands[0].op != "call_function":
                raise CompileError("no matrix makes the scores, so that there is no last hidden state", at=node)
            node = operands[0]
        return cast(fx.Node, node.args[0])

    @property
    def weights(self) -> list[str]:
        """Keys of every weight that is read, in order."""
        functions = self.functions.values() if self.staged else (self.main,)
        return list(dict.fromkeys(key for function in functions for key in function.weights))

    def __call__(self, weights: Mapping[str, Tensor], sample: Sample, turn: int) -> Answer:
        sample = self.here(sample)
        if self.staged:
            return self._generate(weights, sample, turn)
        found = self.main(weights, sample, self._empty(self.program.main, sample))
        tail, mask = found.pop(TAIL, None), sample.get(MASK)
        tokens = sample[self.model.tokens] if self.model else None
        seen = mask != 0 if mask is not None and tokens is not None and mask.shape == tokens.shape else None
        return Answer(found, tail, seen)

    def _generate(self, weights: Mapping[str, Tensor], sample: Sample, turn: int) -> Answer:
        model = cast(LanguageModel, self.model)
        tokens = sample[model.tokens]
        length = tokens.shape[1]
        prompt = max(1, length // PREFIXES[turn % len(PREFIXES)])
        state = self._empty(self.program.main, sample) | self._empty(self.program.entries["decode"], sample)
        state |= self.functions[PREFILL](weights, {model.tokens: tokens[:, :prompt]}, state)
        parts = []
        for name, first, end in spans(stages_of(self.program.info), length, prompt):
            given = {model.tokens: tokens[:, first:end], "past": torch.tensor(first, device=self.device)}
            found = self.functions[name](weights, given, state)
            state |= {key: found[key] for key in self.program.state if key in found}
            parts.append(found)
        tail = torch.cat([part[TAIL] for part in parts], 1) if TAIL in parts[0] else None
        return Answer({model.scores: torch.cat([part[model.scores] for part in parts], 1)}, tail, first=prompt)

    def _empty(self, entry: Entry, sample: Sample) -> dict[str, Tensor]:
        return self.here(empty_state(self.program, entry, sample))

    def here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


def float_outputs(entry: Entry) -> list[str]:
    """Names of the outputs that hold real numbers."""
    pairs = zip(entry.outputs, entry.results(), strict=True)
    return [o.name for o, n in pairs if o.kind == "output" and value(n).is_floating_point()]


def generates_otherwise(program: Program) -> bool:
    """Whether a step of generation reads other weights than the prompt does."""
    if PREFILL not in program.entries or "decode" not in program.entries:
        return False
    wanted = _work(program.entries[PREFILL])
    return any(_work(program.entries[name]) != wanted for name in _decoders(program))


def _decoders(program: Program) -> list[str]:
    return list(dict.fromkeys(stage.entry for stage in stages_of(program.info)))


def _work(entry: Entry) -> Counter[tuple[str, str]]:
    """How often each op reads each matrix."""
    return Counter(
        (str(node.target), binding(u).key)
        for node in entry.calls()
        for u in node.all_input_nodes
        if is_weight(u) and value(u).ndim > 1
    )


@dataclass(frozen=True)
class Choice:
    """The keys that are trained, and why others are not."""

    keys: tuple[str, ...]
    notes: tuple[str, ...]


def trainable(student: Student, patterns: tuple[str, ...], embeddings: bool) -> Choice:
    """Real weights that meet data and match a pattern; `CompileError` when there is none."""
    program, tables = student.program, set[str]()
    meets: set[str] = set()
    rounded: set[str] = set()
    for entry in program.entries.values():
        data = _data(entry)
        for node in entry.calls():
            keys = [binding(u).key for u in node.all_input_nodes if is_weight(u)]
            looked_up = node.target is aten.embedding.default and is_weight(node.args[0])
            tables |= {binding(cast(fx.Node, node.args[0])).key} if looked_up else set()
            meets |= set(keys) if looked_up or any(u in data for u in node.all_input_nodes) else set()
            rounded |= set(keys) if any(_few_bits(program.weights[key]) for key in keys) else set()
    reached = [key for key in student.weights if key in meets]
    named = [key for key in reached if any(p == "all" or fnmatchcase(key, p) for p in patterns)]
    if not named:
        raise CompileError(f"no weight matches {list(patterns)}", hint=f"there are {reached[:5]} and others")
    usable = [key for key in named if key not in rounded and (embeddings or key not in tables)]
    chosen = [key for key in usable if bool(program.weights[key].isfinite().all())]
    notes = _notes(named, rounded, set() if embeddings else tables)
    if student.staged and not all(slot.dtype.is_floating_point for slot in program.state.values()):
        notes = (
            *notes,
            ROUNDED,
        )
    if not chosen:
        hint = "fine-tune before quantising, or give embeddings=True" if notes else "give another pattern"
        raise CompileError(f"nothing is trainable: {'; '.join(notes) or 'no weight is finite'}", hint=hint)
    return Choice(tuple(chosen), notes)


def _few_bits(weight: Tensor) -> bool:
    """Whole numbers, or float8."""
    return not weight.is_floating_point() or weight.itemsize == 1


def _data(entry: Entry) -> set[fx.Node]:
    """What comes from inputs of real numbers or from look-ups; numbers made of positions are none."""
    return reached(Dataflow(entry).sources())


def _notes(named: list[str], rounded: set[str], tables: set[str]) -> tuple[str, ...]:
    kept: dict[str, Any] = {
        "belong to quantised layers": [key for key in named if key in rounded],
        "are tables that tokens are looked up in": [key for key in named if key in tables and key not in rounded],
    }
    return tuple(f"{len(keys)} weights stay as they are: they {why}" for why, keys in kept.items() if keys)
