"""Text to token ids and back, and text that streams without breaking a character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.manifest import TOKENIZER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an artefact or a Hugging Face folder."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ArtefactError(
            f"no {TOKENIZER} in {str(folder)!r}: text cannot be encoded",
            hint="compile a model folder that has one, or give token ids",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CompileError("text needs the package `tokenizers`", hint="pip install tokenizers") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise ArtefactError(
            f"{path} is not a tokenizer: {error}", hint="copy the tokenizer of the model again"
        ) from error


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of a stream of ids, as soon as it is complete: a character may span tokens, and a token need not end on one.

    Joined, the pieces are what decoding all ids at once gives.
    """
    window: list[int] = []
    shown = ""
    for token in ids:
        window.append(token)
        text = _decode(tokenizer, window)
        if text.endswith(BROKEN) or len(text) <= len(shown):
            continue
        yield text[len(shown) :]
        window = window[-1:] if _splits(tokenizer, window, text) else window
        shown = _decode(tokenizer, window)
    rest = _decode(tokenizer, window)[len(shown) :]
    if rest:
        yield rest


def until(given: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first of some texts. What may be the beginning of one is held back until it is known."""
    held = ""
    for piece in given:
        held += piece
        if found := [at for at in (held.find(stop) for stop in stops) if at >= 0]:
            held = held[: min(found)]
            break
        keep = max(n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n]))
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _splits(tokenizer: Tokenizer, window: Sequence[int], text: str) -> bool:
    """Whether the last token starts on a character, so that what follows can be decoded from it alone."""
    last = _decode(tokenizer, window[-1:])
    return len(window) > 1 and bool(last) and BROKEN not in last and text.endswith(last)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
