"""A compiled model: call it like the model, generate with it, save it."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sylvester.compiler import artefact, generation, text
from sylvester.compiler.arrays import is_tensor, to_numpy, to_tensor
from sylvester.compiler.binding import asked
from sylvester.compiler.device_arrays import foreign, on_device, streams, to_device_tensors
from sylvester.compiler.drafts import Drafters, Drafting
from sylvester.compiler.errors import InputError
from sylvester.compiler.manifest import REPORT_HTML, Manifest
from sylvester.compiler.outputs import package
from sylvester.compiler.prefix import Sharing
from sylvester.compiler.runner import Runner
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import generation_of
from sylvester.compiler.session_pool import SessionPool
from sylvester.compiler.writer import Writer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Compiled:
    """An artefact folder, loaded. Torch in, torch out; numpy in, numpy out."""

    def __init__(self, folder: Path, *, threads: int | None = None, runner: Runner | None = None) -> None:
        self._folder = folder
        self._runner = runner or artefact.open_runner(folder, threads)
        self.report = artefact.read_report(folder)
        """Facts about the compilation, as saved in report.json."""
        self._pool = SessionPool()
        self._discard: weakref.finalize[Any, Compiled] | None = None
        self.sharing = Sharing()
        """What sharing the beginnings of prompts did in all calls so far."""

    @staticmethod
    def owning(folder: Path, *, threads: int | None = None) -> Compiled:
        """Load a temporary folder, which is deleted with the object."""
        compiled = Compiled(folder, threads=threads, runner=artefact.placeholder(folder))
        compiled._discard = weakref.finalize(compiled, _delete, folder, os.getpid())
        return compiled

    @property
    def manifest(self) -> Manifest:
        return self._runner.manifest

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading the code on this machine has to say, such as a variant that could not be used."""
        return tuple(getattr(self._runner, "notes", ()))

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(self.manifest.entries)

    @property
    def ledger(self) -> str:
        """What each pass did, as a table."""
        return str(self.report.get("ledger", {}).get("text", ""))

    @property
    def report_html(self) -> Path:
        """The report as a page for a browser; an artefact that was not saved takes it along when it is closed."""
        return self._folder / REPORT_HTML

    def read_weights(self) -> None:
        """Bring the weights into memory now, not at the first call: forked processes then share them."""
        getattr(self._runner, "read_weights", bool)()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return text.load_tokenizer(self._folder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's forward returns. `InputError` says what was given and what was expected.

        Tensors on a GPU are taken from where they are by an artefact that runs there, and so are its outputs; other
        arrays there, by `__cuda_array_interface__`.
        """
        given = self._named(args, kwargs)
        if hasattr(self._runner, "beside") and any(on_device(value) for value in given.values()):
            return package(self.manifest.output.type, self._beside(given))
        outputs: Mapping[str, Any] = self.outputs({name: to_numpy(name, value) for name, value in given.items()})
        if any(is_tensor(value) for value in given.values()):
            specs = self.manifest.entries[self.manifest.main].outputs
            outputs = {s.name: to_tensor(outputs[s.name], s.dtype) for s in specs}
        return package(self.manifest.output.type, outputs)

    def _beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs on the device, for inputs of which some are there."""
        there = {name: value for name, value in given.items() if on_device(value)}
        inputs = {n: foreign(n, v) if n in there else to_numpy(n, v) for n, v in given.items()}
        outputs: dict[str, Any] = self._runner.beside(self.manifest.main, inputs, streams(there.values()))  # type: ignore[attr-defined]
        if not any(is_tensor(value) for value in there.values()):
            return outputs
        return to_device_tensors(outputs, {s.name: s.dtype for s in self.manifest.entries[self.manifest.main].outputs})

    def outputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of the main entry by name, in order; arrays in, arrays out."""
        entry = self.manifest.main
        state = self._runner.new_state(entry, inputs) if self.manifest.entries[entry].states else None
        return self._runner.run(entry, inputs, state)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = [spec.name for spec in asked(self.manifest.entries[self.manifest.main])]
        if len(args) > len(names):
            raise InputError(f"{len(args)} positional inputs given, expected at most {len(names)}: {names}")
        named = dict(zip(names, args, strict=False))
        if twice := sorted(set(named) & set(kwargs)):
            raise InputError(f"input {twice[0]!r} is given twice, by position and by name")
        return named | kwargs

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int | None = None,
        *,
        stream: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: int | str | Sequence[int | str] | None = None,
        chunk: int | None = None,
        reuse: bool | None = None,
        draft: bool | str | None = None,
        share: bool | None = None,
    ) -> Any:
        """Continue a prompt: token ids [batch, length] give ids with the new ones appended, text gives the new text.

        A list of prompts (texts, lists of ids, arrays [length]) gives a list; those of equal length run together, as a
        batch has one position, other lengths one after the other. With `stream`, an iterator over pieces of text, the
        new ids of a single row, or arrays [batch] of new ids.

        `temperature` 0 is greedy; `top_k`, `top_p` and `repetition_penalty` mean what they mean in Hugging Face
        generation. With a `seed`, row n of a call draws the same whatever is beside it. `stop` replaces the ids that
        end a text; texts in it end a text too. `max_new_tokens` None goes on up to the compiled maximum.

        A prompt that begins like the one before, its continuation included, goes on from the caches of that call, and
        a long one is read `chunk` tokens at a time (512; 0 is all at once). Where reading in parts is the same only up
        to more than rounding, as with layers that only decoding skips or caches in few bits, neither is done unless
        `chunk` or `reuse=True` asks for it. `reuse=False` neither takes nor keeps caches.

        `draft` None drafts with what the model was compiled to draft with, if anything, "ngram" with what was read
        before, False not at all. The tokens are the same: drafts are read together and kept as far as the model chooses
        them itself, from the same bits and random numbers. `drafting` says how it went.

        Prompts of a batch that begin alike, as several samples of one do: `share` None reads and keeps what all begin
        with once, if that pays and is the same but for rounding; True always, False never. `sharing` says what it did.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        options = generation.Options(max_new_tokens, sampling, seed, stop, chunk, reuse, draft, share)
        generation_of(self.manifest)
        writer = Writer(self._runner, self._pool, lambda: self.tokenizer, self._drafters, self.sharing)
        return writer.stream(prompt, options) if stream else writer.whole(prompt, options)

    @property
    def drafting(self) -> Drafting:
        """What drafting did in all calls so far."""
        return self._drafters.done()

    @cached_property
    def _drafters(self) -> Drafters:
        return Drafters(generation_of(self.manifest).draft)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text; needs the package `tokenizers` and a tokenizer in the artefact."""
        return list(self.tokenizer.encode(prompt).ids)

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: str | Path) -> Path:
        """Copy the artefact to a folder in one step; an older artefact there is replaced, anything else refused."""
        artefact.copy_to(self._folder, Path(folder))
        return Path(folder)

    def close(self) -> None:
        """Stop the threads and delete the temporary folder, if it has one."""
        self._pool.clear()
        self._runner.close()
        if self._discard is not None:
            self._discard()

    def __enter__(self) -> Compiled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Compiled for {self.manifest.target}:\n{artefact.describe(self.manifest)}"


def _delete(folder: Path, owner: int) -> None:
    """A forked child shares the folder but does not own it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def load(path: str | Path, *, threads: int | None = None) -> Compiled:
    """Load an artefact folder. Every file is checked against its recorded hash before any code runs."""
    compiled = Compiled(Path(path), threads=threads)
    compiled.read_weights()
    return compiled
