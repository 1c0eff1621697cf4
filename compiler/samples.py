"""What `compile(calibration=...)` takes, made into calls of the main entry: texts, token ids, tuples and dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sylvester.compiler.calibration import Calibration, Sample, spread
from sylvester.compiler.errors import CompileError
from sylvester.compiler.next_token import MASK, LanguageModel, language_model, token_input
from sylvester.compiler.program import Program
from sylvester.compiler.quality import perplexity
from sylvester.compiler.sample_check import Signature
from sylvester.compiler.text import load_tokenizer

LONGEST, SHORTEST = 512, 64
"""Tokens of a window that texts are cut into, at most, and at least where there are few."""
CALIBRATION = "calibration"
PARTS = 4
"""The last of so many parts of the samples is held back; texts are cut into as many windows at least."""
TYPES = "token_type_ids"
CHECKED = 16
"""Samples, spread over all, that the model must predict better than by guessing."""
SLACK = 1.001
"""Rounding of a perplexity."""


def listed(given: Iterable[Any] | Calibration | None, word: str = CALIBRATION) -> list[Any] | Calibration | None:
    """The samples of any iterable, read once; `word` names them in errors."""
    if given is None or isinstance(given, Calibration):
        return given
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable) or getattr(given, "ndim", 2) < 2:
        kind = type(given).__name__ + (f" of shape {list(given.shape)}" if hasattr(given, "shape") else "")
        raise CompileError(f"{word} is a {kind}, expected an iterable of samples", hint="for one sample write [x]")
    found = list(given)
    if not found:
        raise CompileError(f"{word} is empty", hint="give at least one sample, better 4 or more")
    return found


def read(program: Program, given: Sequence[Any], word: str = CALIBRATION) -> tuple[Sample, ...]:
    """Samples as calls of the main entry, none held back and none judged; errors as in `parse`."""
    return tuple(_Reader(program, word).samples(given))


def parse(program: Program, given: Sequence[Any] | Calibration) -> Calibration:
    """Samples to fit to, and the last quarter held back; `CompileError` names the sample and the input at fault.

    A `Calibration` keeps its own parts. The samples of a language model are single rows of ids, and the model must
    predict those to fit to, or some of them, better than by guessing.
    """
    reader = _Reader(program)
    if isinstance(given, Calibration):
        found = Calibration(tuple(reader.samples(given.fit)), tuple(reader.samples(given.held)))
    else:
        samples = tuple(reader.samples(given))
        kept = len(samples) - len(samples) // PARTS
        found = Calibration(samples[:kept], samples[kept:])
    if not found.fit:
        raise CompileError("calibration is empty", hint="give at least one sample, better 4 or more")
    if reader.model is not None:
        _check_prediction(program, reader.model, found)
    return found


def _check_prediction(program: Program, model: LanguageModel, data: Calibration) -> None:
    found = perplexity(program, spread(data.fit, min(CHECKED, len(data.fit))))
    if not found <= SLACK * model.vocabulary:
        raise CompileError(
            f"the perplexity of the model on the calibration data is {found:.4g}; guessing evenly among "
            f"{model.vocabulary} tokens gives {model.vocabulary}",
            hint="the data was made with another tokenizer, or the model is untrained: give texts, or ids of its own",
        )


class _Reader:
    """Turns what the caller gave into samples of one program."""

    def __init__(self, program: Program, word: str = CALIBRATION) -> None:
        self.program = program
        self.word = word
        self.model = language_model(program)
        self.signature = Signature.of(program)
        self.tokens = token_input(program)

    def samples(self, given: Sequence[Any]) -> Iterator[Sample]:
        """Neighbouring texts are read as one; every other sample by itself."""
        for textual, run in groupby(enumerate(given), lambda item: isinstance(item[1], str)):
            items = list(run)
            if textual:
                first, last = items[0][0], items[-1][0]
                where = f"{self.word} sample{f's {first} to {last}' if last > first else f' {first}'}"
                yield from self._checked(self._from_texts([text for _, text in items], where), where)
                continue
            for i, value in items:
                where = f"{self.word} sample {i}"
                yield from self._checked(self._from_value(value, where), where)

    def _checked(self, samples: Iterable[Sample], where: str) -> Iterator[Sample]:
        for sample in samples:
            self.signature.check(sample, where)
            if self.model is not None and sample[self.model.tokens].shape[1] < 2:
                raise CompileError(f"{where} has one token, expected at least 2: the next one is predicted")
            yield from self._rows(sample)

    def _rows(self, sample: Sample) -> Iterator[Sample]:
        """Language models take one row at a time, which bounds the memory of measuring."""
        if self.model is None or list(sample) != [self.model.tokens] or self.signature.batch() > 1:
            yield sample
            return
        yield from ({self.model.tokens: row} for row in sample[self.model.tokens].split(1))

    def _from_value(self, value: Any, where: str) -> Iterator[Sample]:
        names = list(self.signature.inputs)
        if isinstance(value, Mapping):
            yield {str(name): _tensor(part, f"{where}: input {name!r}") for name, part in value.items()}
        elif isinstance(value, tuple):
            if len(value) != len(names):
                raise CompileError(f"{where} has {len(value)} tensors, the model takes {len(names)}: {names}")
            yield {name: _tensor(part, f"{where}: input {name!r}") for name, part in zip(names, value, strict=True)}
        elif self.tokens is not None:
            yield from self._from_ids(_ids(value, where), where)
        elif len(names) == 1:
            yield {names[0]: _tensor(value, where)}
        else:
            expected = "a tuple of tensors or a dict by name"
            raise CompileError(f"{where} is a {type(value).__name__}, expected {expected}", hint=f"inputs are {names}")

    def _from_ids(self, ids: Tensor, where: str) -> Iterator[Sample]:
        if ids.ndim == 2:
            yield self._filled(ids, where)
            return
        if ids.ndim != 1:
            raise CompileError(f"{where} has shape {list(ids.shape)}, expected ids [tokens] or [batch, tokens]")
        windows = [ids] if len(ids) <= self._longest() else self._cut(ids)
        yield from self._calls(windows, where, len(ids))

    def _from_texts(self, texts: list[str], where: str) -> Iterator[Sample]:
        if self.tokens is None:
            raise CompileError(f"{where} is text, the model takes no token ids", hint=f"inputs are {self._names()}")
        encoded = [torch.tensor(ids, dtype=torch.int64) for ids in _encode(self.program, texts, where)]
        stream = torch.cat(encoded)
        if self.model is not None:
            yield from self._calls(self._cut(stream), where, len(stream))
            return
        yield from self._calls([ids[: self._longest()] for ids in encoded], where, len(stream))

    def _longest(self) -> int:
        """Tokens of a window: the compiled length, else what the model takes, within reason."""
        return self.signature.length(self._token_name()) or min(LONGEST, self.signature.max_length or LONGEST)

    def _cut(self, ids: Tensor) -> list[Tensor]:
        fixed = self.signature.length(self._token_name())
        return list(ids.split(fixed or min(self._longest(), max(SHORTEST, -(-len(ids) // PARTS)))))

    def _calls(self, windows: list[Tensor], where: str, total: int) -> Iterator[Sample]:
        """Windows as rows of batches; remainders too short for the model or for a batch are left out."""
        batch, fixed = self.signature.batch(), self.signature.length(self._token_name())
        least = fixed or max(self.signature.least(self._token_name(), 1), 2 if self.model else 1)
        usable = [ids for ids in windows if len(ids) >= least and (batch == 1 or len(ids) == len(windows[0]))]
        if len(usable) < batch:
            shape = f"{batch} x {least}" if batch > 1 else str(least)
            raise CompileError(f"{where} has {total} tokens, one call takes at least {shape}", hint="give more text")
        for i in range(0, len(usable) - batch + 1, batch):
            yield self._filled(torch.stack(usable[i : i + batch]), where)

    def _filled(self, ids: Tensor, where: str) -> Sample:
        """A call with these ids: every token counts, and all are of the first segment."""
        made: Sample = {}
        for name, spec in self.signature.inputs.items():
            if name not in (self.tokens, MASK, TYPES):
                raise CompileError(
                    f"{where}: the model also takes {name!r}, which cannot be made from tokens",
                    hint=f"give dicts with {self._names()}",
                )
            values = {MASK: torch.ones_like(ids), TYPES: torch.zeros_like(ids)}.get(name, ids)
            made[name] = values.to(getattr(torch, spec.dtype))
        return made

    def _token_name(self) -> str:
        return str(self.tokens)

    def _names(self) -> list[str]:
        return list(self.signature.inputs)


def _encode(program: Program, texts: list[str], where: str) -> list[list[int]]:
    source = program.info.get("tokenizer")
    if not source:
        raise CompileError(
            f"{where} is text, and the model has no tokenizer",
            hint="compile a model folder with a tokenizer.json, or give token ids",
        )
    tokenizer = load_tokenizer(Path(source).parent)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [list(found.ids) for found in tokenizer.encode_batch(texts)]


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, Tensor):
        raise CompileError(f"{where} is a {type(value).__name__}, expected a tensor or a numpy array")
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise CompileError(f"{where} is a {value.layout} tensor on {value.device}, expected a dense one on the CPU")
    return value.detach()


def _ids(value: Any, where: str) -> Tensor:
    """Token ids of any integer type, also as a list of numbers."""
    if isinstance(value, list) and all(isinstance(n, int) for n in value):
        value = torch.tensor(value, dtype=torch.int64)
    if not isinstance(value, (Tensor, np.ndarray)):
        expected = "a text, token ids, a tuple of inputs or a dict by name"
        raise CompileError(f"{where} is a {type(value).__name__}, expected {expected}")
    ids = _tensor(value, where)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CompileError(f"{where} is {ids.dtype}, expected whole numbers: token ids")
    return ids
