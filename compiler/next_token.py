"""Is a program a language model, and what does it predict: its scores of the next token, teacher forced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calibration import Sample
from sylvester.compiler.program import Entry, Program, binding, value
from sylvester.compiler.stages import DECODE, spans, stages_of

aten = torch.ops.aten
MASK = "attention_mask"


@dataclass(frozen=True)
class LanguageModel:
    """Names of the input of token ids [batch, tokens] and of the output of scores [batch, tokens, vocabulary]."""

    tokens: str
    scores: str
    vocabulary: int


def language_model(program: Program) -> LanguageModel | None:
    """None for a program that scores no next token, such as an encoder or a decoder without its head."""
    if "prefill" not in program.entries and program.info.get("kind") != "causal-lm":
        return None
    tokens, scores = token_input(program), _scores(program.main)
    if tokens is None or scores is None:
        return None
    vocabulary = int(value(program.main.result(scores)).shape[-1])
    rows = table_rows(program.main, tokens)
    return LanguageModel(tokens, scores, vocabulary) if rows is None or vocabulary >= rows else None


def token_input(program: Program) -> str | None:
    """The input of token ids: `input_ids`, else the first of integers [batch, tokens]."""
    nodes = program.main.placeholders("input")
    names = [binding(n).key for n in nodes if value(n).ndim == 2 and value(n).dtype in (torch.int64, torch.int32)]
    return "input_ids" if "input_ids" in names else next(iter(names), None)


def _scores(entry: Entry) -> str | None:
    results = zip(entry.outputs, entry.results(), strict=True)
    facts = {output.name: value(node) for output, node in results if output.kind == "output"}
    fit = [n for n, f in facts.items() if f.ndim == 3 and f.is_floating_point() and isinstance(f.shape[2], int)]
    return "logits" if "logits" in fit else next(iter(fit), None)


def table_rows(entry: Entry, name: str) -> int | None:
    """Rows of the smallest table that an input of ids is looked up in; None when no table of a known size is found."""
    found: list[int] = []
    for node in entry.placeholders("input"):
        users = node.users if binding(node).key == name else ()
        looked_up = [u for u in users if u.target is aten.embedding.default and u.args[1] is node]
        found += [rows for user in looked_up if isinstance(rows := _rows(user), int)]
    return min(found, default=None)


def _rows(embedding: fx.Node) -> Any:
    return value(cast(fx.Node, embedding.args[0])).shape[0]


def run(program: Program, sample: Sample, prompt: int = 0) -> dict[str, Tensor]:
    """Outputs of the main entry; those of a model with caches are read through the caches, as `decode` does.

    The first `prompt` tokens are read by `prefill`, the others by the stages of `decode`, as if they were generated.
    """
    decode = program.entries.get(DECODE)
    if decode is None or set(_inputs(decode)) - _scalars(decode) != set(sample):
        name = next(key for key, known in program.entries.items() if known is program.main)
        return program.run(name, sample, empty_state(program, program.main, sample))
    return _staged(program, sample, prompt)


def _staged(program: Program, sample: Sample, prompt: int) -> dict[str, Tensor]:
    """Every stretch of tokens by its own entry, over the same caches."""
    name, tokens = next((key, t) for key, t in sample.items() if t.ndim == 2)
    main = next(key for key, known in program.entries.items() if known is program.main)
    stretches = [(main, 0, prompt)] if prompt else []
    stretches += spans(stages_of(program.info), tokens.shape[1], prompt)
    state = empty_state(program, program.entries[DECODE], sample)
    found: list[dict[str, Tensor]] = []
    for entry, first, end in stretches:
        past = {key: torch.tensor(first) for key in _scalars(program.entries[entry])}
        results = program.run(entry, {name: tokens[:, first:end]} | past, state)
        state |= {key: value for key, value in results.items() if key in state}
        found.append(results)
    names = [o.name for o in program.entries[stretches[-1][0]].outputs if o.kind == "output"]
    return found[-1] if len(found) == 1 else {key: torch.cat([part[key] for part in found], 1) for key in names}


def _inputs(entry: Entry) -> list[str]:
    return [binding(n).key for n in entry.placeholders("input")]


def _scalars(entry: Entry) -> set[str]:
    return {binding(n).key for n in entry.placeholders("input") if value(n).ndim == 0}


def empty_state(program: Program, entry: Entry, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caches of zeros with as many rows as the sample has tokens."""
    keys = [binding(n).key for n in entry.placeholders("state")]
    if not keys:
        return {}
    batch, length = next(t.shape for t in sample.values() if t.ndim == 2)
    slots = {key: program.state[key] for key in keys}
    rest: dict[str, Any] = {key: slot.shape[3:] for key, slot in slots.items()}
    return {
        key: torch.zeros([batch, int(slot.shape[1]), length, *map(int, rest[key])], dtype=slot.dtype)
        for key, slot in slots.items()
    }


def predictions(program: Program, model: LanguageModel, sample: Sample, prompt: int = 0) -> tuple[Tensor, Tensor]:
    """Scores [positions, vocabulary] of each token that follows another, and these tokens [positions].

    With a `prompt`, as in `run`, only those that follow a token after it.
    """
    scores = run(program, sample, prompt)[model.scores]
    rest = {name: t[:, prompt:] if t.ndim == 2 else t for name, t in sample.items()}
    return following(model, scores[:, prompt:], rest)


def following(model: LanguageModel, scores: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Scores [batch, tokens, vocabulary] -> those [positions, vocabulary] of tokens that follow others, and the tokens.

    Where the sample has an attention mask, tokens that it hides do not count.
    """
    tokens = sample[model.tokens]
    found, wanted = scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    mask = sample.get(MASK)
    if mask is None or mask.shape != tokens.shape:
        return found, wanted
    seen = ((mask[:, 1:] != 0) & (mask[:, :-1] != 0)).flatten()
    return found[seen], wanted[seen]
