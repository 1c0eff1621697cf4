"""Autoregressive decoding: read the prompt, then choose a token and read it, until the limit or the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from sylvester.compiler.drafts import Drafters, Drafting
from sylvester.compiler.errors import InputError, Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.prefix import Sharing, share
from sylvester.compiler.prompts import require_fit
from sylvester.compiler.runner import Runner
from sylvester.compiler.sampling import Sampling, require
from sylvester.compiler.session import CHUNK, generation_of
from sylvester.compiler.session_pool import SessionPool
from sylvester.compiler.speculation import Speculation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """How long to go on, how to choose, where to stop, how to read.

    `stop` are ids, and for text also texts; None, or texts only: the ids that the model's config names. `chunk` tokens
    of a prompt are read at once, 0 for all; `reuse` goes on from the caches of an earlier call. Their None is 512 and
    True where reading a prompt in parts computes the same, else 0 and False. `share` reads what all rows of a batch
    begin with once; None where it computes the same and pays.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: int | str | Sequence[int | str] | None = None
    chunk: int | None = None
    reuse: bool | None = None
    draft: bool | str | None = None
    share: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seed", "chunk"):
            if (value := getattr(self, name)) is not None:
                require(name, value, Integral, lambda n: n >= 0, "a whole number, 0 or more, or None")
        for name in ("reuse", "share"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise InputError(f"{name} is {value!r}, expected True, False or None")
        if self.draft not in (None, True, False, "ngram"):
            raise InputError(f"draft is {self.draft!r}, expected 'ngram', False, or None for what was compiled")
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
    runner: Runner,
    prompt: Ids,
    options: Options,
    pool: SessionPool | None = None,
    rows: Sequence[int] = (),
    drafters: Drafters | None = None,
    sharing: Sharing | None = None,
) -> Iterator[Ids]:
    """The new token of every row [batch], step by step, until the limit or until every row has stopped.

    A row that has stopped repeats its stop id. Prompts of a batch have equal lengths. A prompt that does not fit is
    refused before the first step. `rows` are the numbers of the rows in the whole call: each draws for itself.
    """
    import numpy as np

    count = budget(runner.manifest, prompt, options.max_new_tokens)
    drafter = (drafters or Drafters(None)).find(options.draft, options.sampling.temperature == 0)
    if drafter and not _verifies(runner.manifest, options.draft):
        drafter = None
    uniform = generation_of(runner.manifest).uniform
    chunk = options.chunk if options.chunk is not None else CHUNK if uniform else 0
    pool = pool if pool is not None and (uniform if options.reuse is None else options.reuse) else SessionPool(kept=0)
    session = pool.take(runner, prompt, chunk)
    share(session, prompt, options.share, sharing or Sharing())
    draws = [
        np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=(row,)))
        for row in rows or range(len(prompt))
    ]
    speculation = Speculation(
        session, options.sampling, lambda: np.array([draw.random() for draw in draws]), drafter,
        drafters.tally if drafters else Drafting(), drafters.spec.tree if drafters else "",
    )  # fmt: skip
    return _steps(speculation, pool, prompt, count, options.stop_ids(runner.manifest))


def _steps(speculation: Speculation, pool: SessionPool, prompt: Ids, count: int, stop: Sequence[int]) -> Iterator[Ids]:
    import numpy as np

    done, made, last = np.zeros(len(prompt), bool), 0, prompt[:, -1]
    with pool.returned(speculation.session):
        while made < count and not done.all():
            for chosen in speculation.next(last, count - made, done) if made else [speculation.first(prompt)]:
                last = np.where(done, last, chosen) if made else chosen
                done |= np.isin(last, stop)
                made += 1
                yield last
                if done.all():
                    return


def _verifies(manifest: Manifest, asked: bool | str | None) -> bool:
    """Whether drafts can be verified; `Unsupported` where the caller asks for what cannot be."""
    if not generation_of(manifest).steady and asked:
        raise Unsupported(
            "this artefact cannot verify drafts: rounding depends on how many tokens come together",
            hint="generate with draft=False",
        )
    return generation_of(manifest).steady


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
