"""The tokenizer of a page: one package from npm, copied into every bundle."""

from __future__ import annotations

from pathlib import Path

from sylvester.backends.npm import Package

PACKAGE = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
)
FILES = {"package/dist/tokenizers.min.mjs": "tokenizers.min.mjs", "package/LICENSE": "LICENSE"}


def copy_tokenizer(folder: Path) -> None:
    """Put the code and its licence into `folder`; `CompileError` says why not."""
    PACKAGE.extract(FILES, folder)
