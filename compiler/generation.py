"""Autoregressive decoding over the entries `start` (or `prefill`) and `decode` of an artefact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sylvester.compiler.binding import asked
from sylvester.compiler.errors import InputError, Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.runner import Runner, State
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.stages import entry_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

PREFILL, START, DECODE = "prefill", "start", "decode"


@dataclass(frozen=True)
class Options:
    """How long to go on, how to choose, where to stop. `stop` None: the ids the model's config names."""

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: tuple[int, ...] | None = None


def require_generation(manifest: Manifest) -> None:
    stages = manifest.generation.stages if manifest.generation else ()
    missing = [n for n in (PREFILL, DECODE, *(s.entry for s in stages)) if n not in manifest.entries]
    if missing or manifest.generation is None:
        found = list(manifest.entries)
        raise Unsupported(
            f"this artefact cannot generate: it has the entries {found}", hint="compile a causal language model"
        )


def steps(runner: Runner, prompt: Ids, options: Options) -> Iterator[Ids]:
    """The new token of every row [batch], step by step, until the limit or until every row has stopped.

    A row that has stopped repeats its stop id. Prompts of a batch have equal lengths. A prompt that does not fit is
    refused before the first step.
    """
    name = _ids_input(runner.manifest)
    count = _token_budget(runner.manifest, prompt, options.max_new_tokens)
    state = runner.new_state(_first(runner.manifest), {name: prompt})
    return _steps(runner, name, prompt, state, count, options)


def _steps(runner: Runner, name: str, prompt: Ids, state: State, count: int, options: Options) -> Iterator[Ids]:
    import numpy as np

    stop = _stop_ids(runner.manifest, options)
    random = np.random.default_rng(options.seed)
    entry, tokens = _first(runner.manifest), prompt
    done = np.zeros(len(prompt), bool)
    for step in range(count):
        logits = _advance(runner, entry, {name: tokens}, state)
        chosen = options.sampling.pick(logits, random)
        if step:
            chosen = np.where(done, tokens[:, 0], chosen)
        done |= np.isin(chosen, stop)
        yield chosen
        if done.all():
            return
        entry, tokens = _variant(runner.manifest, state.position, step + 1), chosen[:, None]


def _first(manifest: Manifest) -> str:
    """The entry that takes the prompt: `start` gives the logits of its last token only."""
    return START if START in manifest.entries else PREFILL


def _variant(manifest: Manifest, position: int, generated: int) -> str:
    """The entry that takes the next step."""
    return entry_at(manifest.generation.stages if manifest.generation else (), position, generated)


def _advance(runner: Runner, entry: str, inputs: dict[str, Ids], state: State) -> NDArray[Any]:
    """Run one entry, move the position, and return the logits of the last position [batch, vocabulary]."""
    outputs = runner.run(entry, inputs, state)
    state.position += next(iter(inputs.values())).shape[1]
    logits: NDArray[Any] = outputs.get("logits", next(iter(outputs.values())))
    return logits[:, -1]


def _ids_input(manifest: Manifest) -> str:
    specs = asked(manifest.entries[PREFILL])
    if len(specs) != 1:
        raise Unsupported(f"generation gives token ids only, but the model takes {[s.name for s in specs]}")
    return specs[0].name


def _token_budget(manifest: Manifest, prompt: Ids, wanted: int | None) -> int:
    """How many tokens to make; `InputError` when they do not fit the caches."""
    limit = manifest.generation.max_length if manifest.generation else 0
    length = prompt.shape[1]
    if prompt.size == 0:
        raise InputError("the prompt has no tokens, expected at least one")
    if wanted is not None and wanted < 0:
        raise InputError(f"max_new_tokens is {wanted}, expected 0 or more")
    if length > limit:
        raise InputError(
            f"the prompt has {length} tokens, above the compiled maximum of {limit}", hint="shorten the prompt"
        )
    if wanted is not None and length + wanted > limit:
        total = f"{length} prompt tokens + {wanted} new tokens = {length + wanted}"
        raise InputError(
            f"{total}, above the compiled maximum of {limit}", hint=f"max_new_tokens may be up to {limit - length}"
        )
    return limit - length if wanted is None else wanted


def _stop_ids(manifest: Manifest, options: Options) -> list[int]:
    if options.stop is not None:
        return list(options.stop)
    return list(manifest.generation.eos_token_ids) if manifest.generation else []
