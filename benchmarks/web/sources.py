"""The weights that every engine computes, and the tokens that it is given."""

from __future__ import annotations

import functools
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from benchmarks.quality.recipes import MODEL
from benchmarks.suite.shapes import Checkpoint, token_ids
from benchmarks.suite.sizes import SEQUENCE
from benchmarks.web.works import CONTEXT, PROMPT, SHIPPED, STEPS, PageWork

FIRST_BYTE = 3
"""The token of byte 0 in the vocabulary of the GGUF files."""
ASCII = 128
"""Bytes that are tokens: wllama's answers hold the text of its tokens, which must be valid by itself."""
BEGINNING = (1, FIRST_BYTE + ASCII)
"""What llama.cpp puts before a text: the token that begins texts, and a space."""
CHECKED = 16
"""Tokens that every engine generates before it is timed."""


@dataclass(frozen=True)
class Shipped(Checkpoint):
    """The language model of this repository."""

    @functools.cached_property
    def folder(self) -> Path:
        return Path(MODEL)

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig.from_pretrained(self.folder)


def checkpoint(shape: str, models: Path) -> Checkpoint:
    return Shipped(shape, models) if shape == SHIPPED else Checkpoint(shape, models)


def given(work: PageWork) -> dict[str, Any]:
    """What every engine reads, and how many tokens it adds. wllama takes texts only: letters, which are bytes to it."""
    if work.kind == "encode":
        return {"ids": token_ids(work.shape, 1, SEQUENCE)[0].tolist()}
    length = {"decode": CONTEXT - STEPS // 2, "prefill": PROMPT}[work.kind]
    text = "".join(random.Random(1).choices(string.ascii_lowercase, k=length - len(BEGINNING)))
    return {"ids": [*BEGINNING, *(FIRST_BYTE + byte for byte in text.encode())], "text": text, "steps": STEPS}
