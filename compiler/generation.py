"""Autoregressive decoding: read the prompt, then choose a token and read it, until the limit or the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from sylvester.compiler.errors import InputError
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.prompts import require_fit
from sylvester.compiler.runner import Runner
from sylvester.compiler.sampling import Sampling, require
from sylvester.compiler.session import CHUNK, Session, generation_of
from sylvester.compiler.session_pool import SessionPool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """How long to go on, how to choose, where to stop, how to read.

    `stop` are ids, and for text also texts; None, or texts only: the ids that the model's config names. `chunk` tokens
    of a prompt are read at once, 0 for all; `reuse` goes on from the caches of an earlier call. Their None is 512 and
    True where reading a prompt in parts computes the same, else 0 and False.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: int | str | Sequence[int | str] | None = None
    chunk: int | None = None
    reuse: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seed", "chunk"):
            if (value := getattr(self, name)) is not None:
                require(name, value, Integral, lambda n: n >= 0, "a whole number, 0 or more, or None")
        if not isinstance(self.reuse, bool | None):
            raise InputError(f"reuse is {self.reuse!r}, expected True, False or None")
        for item in self._stops():
            if isinstance(item, bool) or not isinstance(item, Integral | str) or item == "":
                raise InputError(f"stop has {item!r}, expected token ids", hint="stop=(id, ...), for a text also texts")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(item for item in self._stops() if isinstance(item, str))

    def stop_ids(self, manifest: Manifest) -> tuple[int, ...]:
        """The ids that end a row."""
        given = tuple(int(item) for item in self._stops() if not isinstance(item, str))
        replaced = self.stop is not None and (given or not self.stop_texts)
        return given if replaced else generation_of(manifest).eos_token_ids

    def _stops(self) -> Sequence[int | str]:
        if self.stop is None:
            return ()
        if isinstance(self.stop, int | str):
            return (self.stop,)
        try:
            return tuple(self.stop)
        except TypeError:
            found = type(self.stop).__name__
            raise InputError(f"stop is a {found}, expected token ids", hint="stop=(id, ...)") from None


def steps(
    runner: Runner, prompt: Ids, options: Options, pool: SessionPool | None = None, rows: Sequence[int] = ()
) -> Iterator[Ids]:
    """The new token of every row [batch], step by step, until the limit or until every row has stopped.

    A row that has stopped repeats its stop id. Prompts of a batch have equal lengths. A prompt that does not fit is
    refused before the first step. `rows` are the numbers of the rows in the whole call: each draws for itself.
    """
    count = budget(runner.manifest, prompt, options.max_new_tokens)
    uniform = generation_of(runner.manifest).uniform
    chunk = options.chunk if options.chunk is not None else CHUNK if uniform else 0
    pool = pool if pool is not None and (uniform if options.reuse is None else options.reuse) else SessionPool(kept=0)
    session = pool.take(runner, prompt, chunk)
    return _steps(session, pool, prompt, count, options, rows or range(len(prompt)))


def _steps(
    session: Session, pool: SessionPool, prompt: Ids, count: int, options: Options, rows: Sequence[int]
) -> Iterator[Ids]:
    import numpy as np

    stop = options.stop_ids(session.runner.manifest)
    draws = [np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=(row,))) for row in rows]
    tokens, done = prompt[:, session.position :], np.zeros(len(prompt), bool)
    with pool.returned(session):
        for step in range(count):
            logits = session.feed(tokens)
            uniform = np.array([draw.random() for draw in draws])
            chosen = options.sampling.pick(logits, session.tokens, uniform)
            if step:
                chosen = np.where(done, tokens[:, 0], chosen)
            done |= np.isin(chosen, stop)
            yield chosen
            if done.all():
                return
            tokens = chosen[:, None]


def budget(manifest: Manifest, prompt: Ids, wanted: int | None) -> int:
    """How many tokens to make; `InputError` when the prompt, or they, do not fit."""
    require_fit(manifest, prompt)
    limit, length = generation_of(manifest).max_length, prompt.shape[1]
    if wanted is not None and length + wanted > limit:
        total = f"{length} prompt tokens + {wanted} new tokens = {length + wanted}"
        raise InputError(
            f"{total}, above the compiled maximum of {limit}", hint=f"max_new_tokens may be up to {limit - length}"
        )
    return limit - length if wanted is None else wanted
