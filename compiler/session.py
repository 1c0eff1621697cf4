"""A batch of sequences in the caches of a runner: read tokens, get logits, go back to an earlier position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sylvester.compiler.arrays import floats
from sylvester.compiler.binding import asked
from sylvester.compiler.buckets import padding
from sylvester.compiler.errors import InputError, Unsupported
from sylvester.compiler.manifest import Generation, Manifest
from sylvester.compiler.runner import Runner, State
from sylvester.compiler.stages import DECODE, DEPTHS, entry_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Logits = NDArray[np.floating[Any]]
    Given = Mapping[str, NDArray[Any]]

PREFILL, START = "prefill", "start"
CHUNK = 512
"""Tokens of a prompt that are read by one call, where reading it in parts changes nothing."""


class Session:
    """One runner, one state, and the tokens that its caches hold; for one thread at a time.

    Positions below `prompt` are read as a prompt, later ones as generated tokens: that is what the stages of `decode`
    go by. `chunk` is how many tokens one call reads at most, 0 is no limit.
    """

    def __init__(self, runner: Runner, state: State, batch: int, prompt: int, chunk: int = 0) -> None:
        import numpy as np

        self.runner, self.state, self.prompt, self.chunk = runner, state, prompt, chunk
        self.limit = generation_of(runner.manifest).max_length
        self._stages = generation_of(runner.manifest).stages
        self._pads = generation_of(runner.manifest).padded
        self._ids = ids_input(runner.manifest)
        self._tokens: Ids = np.empty((batch, self.limit), np.int64)

    @staticmethod
    def begin(runner: Runner, prompt: Ids, chunk: int = 0) -> Session:
        """Empty caches for a prompt [batch, length], which `feed` reads."""
        state = runner.new_state(first_entry(runner.manifest), {ids_input(runner.manifest): prompt})
        batch, length = prompt.shape
        return Session(runner, state, batch, length, chunk)

    @property
    def position(self) -> int:
        """How many tokens of every row the caches hold."""
        return self.state.position

    @property
    def tokens(self) -> Ids:
        """What the caches hold [batch, position]: a view, to be read only."""
        return self._tokens[:, : self.position]

    def feed(self, tokens: Ids) -> Logits:
        """Read tokens [batch, n] after those held; logits [batch, vocabulary] of what follows the last one."""
        *before, last = self._calls(tokens, first_entry(self.runner.manifest))
        for entry, part in before:
            self._read(entry, part)
        return self._read(*last)

    def score(self, tokens: Ids) -> Logits:
        """Read tokens [batch, n] after those held; logits [batch, n, vocabulary] of what follows each."""
        import numpy as np

        parts = [self._run(entry, part) for entry, part in self._calls(tokens, PREFILL)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def branch(self, entry: str, tokens: Ids, depths: Sequence[int]) -> Logits:
        """Read a tree of tokens [batch, n] in preorder after those held; logits [batch, n, vocabulary] after each.

        `depths` [n] count from 0, where those held end.
        """
        import numpy as np

        self._require_room(tokens)
        return self._run(entry, tokens, {DEPTHS: np.array(depths, np.int64)})

    def keep(self, start: int, path: Sequence[int]) -> None:
        """Of the tokens from `start` on, those numbered in the path come first, in its order; the others come after.

        The caches hold the tokens of the path only.
        """
        others = [n for n in range(self.position - start) if n not in path]
        self._tokens[:, start : self.position] = self._tokens[:, [start + n for n in (*path, *others)]]
        first = next(n for n, token in enumerate(path) if n != token)
        rows = [start + n for n in path[first:]]
        for array in self.state.arrays.values():
            array[:, :, start + first : start + len(path)] = array[:, :, rows]

    def ahead(self, entry: str, tokens: Ids, distance: int, given: Given | None = None) -> Logits:
        """Logits [batch, vocabulary] of another entry for tokens [batch, n] `distance` positions after those held.

        What it writes into the caches lies behind what they hold. `given` are its inputs but tokens and position.
        """
        return self._at(entry, tokens, self.position + distance, given)[:, -1]

    def again(self, entry: str, start: int, end: int, given: Given | None = None) -> Logits:
        """Logits [batch, end - start, vocabulary] of another entry for the tokens held from `start` to `end`.

        What the caches hold stays as it is: what the entry writes there is undone.
        """
        names = self.runner.manifest.entries[entry].states
        held = {name: self.state.arrays[name][:, :, start:end].copy() for name in names}
        try:
            return self._at(entry, self._tokens[:, start:end], start, given)
        finally:
            for name, rows in held.items():
                self.state.arrays[name][:, :, start:end] = rows

    def _at(self, entry: str, tokens: Ids, place: int, given: Given | None) -> Logits:
        """Logits of an entry that reads tokens [batch, n] from position `place` on; the session stays where it is."""
        import numpy as np

        position, spec = self.state.position, self.runner.manifest.entries[entry]
        inputs = {self._ids: tokens, **(given or {})}
        if not spec.states:
            at = {s.name: np.array(place) for s in spec.inputs if s.name not in inputs}
            return self._logits(entry, self.runner.run(entry, inputs | at))
        self.state.position = place
        try:
            return self._logits(entry, self.runner.run(entry, inputs, self.state))
        finally:
            self.state.position = position

    def expect(self) -> None:
        """What is chosen next will be read next: a device may begin with it."""
        if self.position < self.limit and (expect := getattr(self.runner, "expect", None)):
            expect(self._entry(self.position), self._ids, self.state, len(self._tokens))

    def stretch(self) -> int:
        """How many tokens from here on the same entry reads."""
        return self._length(self.position, self.limit - self.position) if self.position else self.limit

    def share(self, tokens: Ids, keep: bool) -> None:
        """Read what row 0 alone needs of tokens [n], the first of every row.

        With `keep`, row 0 holds their keys and values for all rows; else the others get copies.
        """
        start, end = self.position, len(tokens)
        if keep and not start:
            getattr(self.runner, "spare", bool)(self.state)
        if start < end:
            first = State({name: array[:1] for name, array in self.state.arrays.items()}, start)
            Session(self.runner, first, 1, self.prompt, self.chunk).feed(tokens[None, start:])
            self._tokens[:, start:end] = tokens[start:]
            self.state.position = end
        if keep:
            self.state.shared = end
            return
        for array in self.state.arrays.values() if start < end else ():
            array[1:, :, start:end] = array[:1, :, start:end]

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on. What the caches hold of them is never read, and is written anew."""
        if not 0 <= position <= self.position:
            raise InputError(f"cannot go to position {position}, the caches hold positions 0 to {self.position}")
        self.state.position, self.state.shared = position, min(self.state.shared, position)

    def _calls(self, tokens: Ids, first: str) -> list[tuple[str, Ids]]:
        """(entry, tokens) of every call: `first` at position 0, then the stages of `decode`."""
        self._require_room(tokens)
        calls, at = [], 0
        while at < tokens.shape[1]:
            start = self.position + at
            entry = self._entry(start) if start else first
            count = self._length(start, tokens.shape[1] - at)
            calls.append((entry, tokens[:, at : at + count]))
            at += count
        return calls

    def _entry(self, position: int) -> str:
        return entry_at(self._stages, position, max(0, position - self.prompt + 1))

    def _length(self, start: int, rest: int) -> int:
        """How many of `rest` tokens at `start` one call reads."""
        most = min(rest, self.chunk or rest)
        if not start:
            return min(most, max(self.prompt, 1)) if self._stages else most
        if len(self._stages) < 2:
            return most
        entry = self._entry(start)
        return next((n for n in range(1, most) if self._entry(start + n) != entry), most)

    def _read(self, entry: str, tokens: Ids) -> Logits:
        """Logits [batch, vocabulary] after the last of tokens [batch, n], padded where that fits."""
        import numpy as np

        count = tokens.shape[1]
        self.state.padding = padding(count, self.limit - self.position) if self._pads else 0
        try:
            logits = self._run(entry, np.pad(tokens, ((0, 0), (0, self.state.padding)), "edge"))
        finally:
            self.state.padding = 0
        return logits[:, min(count, logits.shape[1]) - 1]

    def _run(self, entry: str, tokens: Ids, others: Mapping[str, NDArray[Any]] | None = None) -> Logits:
        """Logits [batch, n or 1, vocabulary]; those of a device stay there until they are read."""
        run = getattr(self.runner, "there", self.runner.run)
        outputs = run(entry, {self._ids: tokens, **(others or {})}, self.state)
        count = tokens.shape[1] - self.state.padding
        end = self.position + count
        self._tokens[:, self.position : end] = tokens[:, :count]
        self.state.position = end
        return self._logits(entry, outputs)

    def _logits(self, entry: str, outputs: dict[str, NDArray[Any]]) -> Logits:
        spec = self.runner.manifest.entries[entry]
        output = next((o for o in spec.outputs if o.name == "logits"), spec.outputs[0])
        return floats(outputs[output.name], output.dtype)

    def _require_room(self, tokens: Ids) -> None:
        batch = len(self._tokens)
        if tokens.ndim != 2 or len(tokens) != batch or tokens.shape[1] < 1:
            raise InputError(f"tokens have shape {list(tokens.shape)}, expected [{batch}, 1 or more]")
        if self.position + tokens.shape[1] > self.limit:
            raise InputError(
                f"{tokens.shape[1]} tokens after {self.position} do not fit the caches of {self.limit} positions",
                hint="compile with a larger maximum length",
            )


def generation_of(manifest: Manifest) -> Generation:
    """What the artefact says about generation; `Unsupported` when it cannot generate."""
    found = manifest.generation
    stages = found.stages if found else ()
    missing = [n for n in (PREFILL, DECODE, *(s.entry for s in stages)) if n not in manifest.entries]
    if missing or found is None:
        raise Unsupported(
            f"this artefact cannot generate: it has the entries {list(manifest.entries)}",
            hint="compile a causal language model",
        )
    return found


def first_entry(manifest: Manifest) -> str:
    """The entry that takes the first tokens: `start` gives the logits of the last one only."""
    return START if START in manifest.entries else PREFILL


def ids_input(manifest: Manifest) -> str:
    specs = asked(manifest.entries[PREFILL])
    if len(specs) != 1:
        raise Unsupported(f"generation gives token ids only, but the model takes {[s.name for s in specs]}")
    return specs[0].name


def vocabulary(manifest: Manifest) -> int | None:
    """How many token ids there are: the logits of one position; None when that is no fixed number."""
    outputs = manifest.entries[DECODE].outputs
    width = next((o for o in outputs if o.name == "logits"), outputs[0]).shape[-1]
    return width if isinstance(width, int) else None
