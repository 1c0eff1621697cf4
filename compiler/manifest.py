"""manifest.json of an artefact folder: what it holds, checked before anything in it is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.schema import SchemaError, load
from sylvester.compiler.stages import Stage

FORMAT = 1
NAME = "manifest.json"
PRODUCER = "sylvester"
TOKENIZER = "tokenizer.json"
REPORT = "report.json"
REPORT_HTML = "report.html"
WEIGHTS = "weights.safetensors"

Size = int | str
"""A dimension: a number, or an expression in the symbols of its entry such as "s0" or "2*s0"."""


@dataclass(frozen=True)
class Symbol:
    """A size known at call time; `max` None is unbounded."""

    name: str
    min: int = 1
    max: int | None = None


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class EntrySpec:
    """Symbols in the order of `sizes`; the tensors in the order of the compiled function's buffers."""

    symbols: tuple[Symbol, ...]
    inputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...]
    states: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class SlotSpec:
    index: int
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class SumSpec:
    """A weight [n, k]: a stored one, or sum over s of coefficients[s] atoms[s], plus left right if there are any."""

    weight: str = ""
    atoms: str = ""
    coefficients: str = ""
    left: str = ""
    right: str = ""


@dataclass(frozen=True)
class DerivedSpec:
    """A tensor that is made when the artefact is loaded: weights as they are, or in panels as linear layers read them.

    With `ways` > 1 the panels of the weights take turns.
    """

    parts: tuple[SumSpec, ...]
    panels: bool = True
    ways: int = 1


@dataclass(frozen=True)
class FileSpec:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class OutputSpec:
    """What a call returns: a lone tensor, a tuple, or values by name."""

    type: str = "tensor"


@dataclass(frozen=True)
class DraftSpec:
    """What proposes tokens: an entry over the same caches, "" for none, and n-grams of what was read.

    `tree` is the entry that reads several continuations together, "" for none.
    `chooses` "swift" or "exit": which parts the entry skips is found while generating. `layers` has the layer of each
    part, `kinds` says what it is: attention or FFN.
    """

    entry: str = ""
    ngram: bool = False
    tree: str = ""
    chooses: str = ""
    layers: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """What `generate` needs: the longest sequence the caches hold, the ids that end a text, variants of `decode`."""

    max_length: int
    eos_token_ids: tuple[int, ...] = ()
    stages: tuple[Stage, ...] = ()
    uniform: bool = False
    """Whether `decode` computes what `prefill` does, but for rounding: a prompt may then be read in parts."""
    steady: bool = False
    """Whether a token read together with others has the bits it would have alone: drafts may then be verified."""
    draft: DraftSpec | None = None
    padded: bool = False
    """Whether tokens behind those of a prompt change nothing of it: `start` takes their number as `padding`."""


@dataclass(frozen=True)
class Manifest:
    target: str
    entries: dict[str, EntrySpec]
    format: int = FORMAT
    producer: str = PRODUCER
    isas: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    files: dict[str, FileSpec] = field(default_factory=dict)
    state: dict[str, SlotSpec] = field(default_factory=dict)
    output: OutputSpec = OutputSpec()
    generation: Generation | None = None
    threads: int = 0
    arch: str = ""
    """The architecture of the native code; empty: there is none, or any."""
    derived: dict[str, DerivedSpec] = field(default_factory=dict)
    """Weights of entries that no file holds."""

    @property
    def main(self) -> str:
        """The entry that computes what the model's forward computed."""
        return next((n for n in ("forward", "prefill") if n in self.entries), next(iter(self.entries), ""))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def seal(self, folder: Path) -> Manifest:
        """Record the size and hash of every file under `folder` and write the manifest there."""
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME)
        files = {p.relative_to(folder).as_posix(): FileSpec(sha256(p), p.stat().st_size) for p in paths}
        sealed = replace(self, files=files)
        (folder / NAME).write_text(sealed.to_json() + "\n", encoding="utf-8")
        return sealed


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> Manifest:
    """The manifest of an artefact folder, checked for form. `ArtefactError` names the file and the field."""
    path = folder / NAME
    if not folder.is_dir():
        raise ArtefactError(f"no folder {str(folder)!r}", hint="give the folder that `compiled.save(folder)` wrote")
    if not path.is_file():
        raise ArtefactError(
            f"{str(folder)!r} is not an artefact: it has no {NAME}", hint="compile a model with `sylvester compile`"
        )
    data = _parse(path)
    _check_format(path, data)
    try:
        return load(Manifest, data)
    except SchemaError as error:
        raise ArtefactError(f"{path}: {error}", hint="the file was edited; compile the model again") from error


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtefactError(
            f"{path} is not JSON: {error}", hint="the file is truncated; compile the model again"
        ) from error
    if not isinstance(data, dict) or data.get("producer") != PRODUCER:
        raise ArtefactError(
            f"{path} was not written by {PRODUCER}", hint="give a folder that `compiled.save(folder)` wrote"
        )
    return data


def _check_format(path: Path, data: dict[str, Any]) -> None:
    found = data.get("format")
    if found == FORMAT:
        return
    newer = isinstance(found, int) and found > FORMAT
    hint = "update sylvester" if newer else "compile the model again with this version"
    raise ArtefactError(f"{path} has format {found!r}, this version reads format {FORMAT}", hint=hint)


def read_verified(folder: Path) -> Manifest:
    """The manifest, after every file it lists was found unchanged and no other file was found among the code."""
    manifest = read(folder)
    for name, spec in manifest.files.items():
        _verify_file(folder, name, spec)
    for path in sorted((folder / "code").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in manifest.files:
            raise ArtefactError(
                f"{name} in {str(folder)!r} is foreign: the manifest does not list it", hint="delete it"
            )
    return manifest


def _verify_file(folder: Path, name: str, spec: FileSpec) -> None:
    again = "copy the whole folder again, or compile the model again"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ArtefactError(f"{folder / NAME}: files.{name}: points outside the folder", hint="do not load this folder")
    path = folder / name
    if not path.is_file():
        raise ArtefactError(f"{name} is missing in {str(folder)!r}", hint=again)
    size = path.stat().st_size
    if size != spec.bytes:
        state = "truncated" if size < spec.bytes else "edited"
        raise ArtefactError(f"{name} in {str(folder)!r} is {state}: {size} bytes, expected {spec.bytes}", hint=again)
    if sha256(path) != spec.sha256:
        raise ArtefactError(f"{name} in {str(folder)!r} is edited: its sha256 is not the recorded one", hint=again)
