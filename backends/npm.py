"""Packages from npm at pinned versions: fetched once into the cache folder, and checked by their hash."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, ToolchainMissing


@dataclass(frozen=True)
class Package:
    """A version of a package; `sha512` is what npm's lock files state of it."""

    name: str
    version: str
    sha512: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def kept(self) -> Path:
        return knobs.cache_folder() / "npm" / f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    def available(self) -> bool:
        """Whether it is here already, or npm is there to ask."""
        return self.kept.is_file() or shutil.which("npm") is not None

    def archive(self) -> Path:
        """The package in the cache folder, as npm publishes it."""
        kept = self.kept
        if not kept.is_file() or _sum(kept) != self.sha512:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".npm-", dir=kept.parent) as work:
                self._pack(Path(work)).replace(kept)
        return kept

    def extract(self, files: Mapping[str, str], folder: Path) -> None:
        """Members of the archive under other names in `folder`; `CompileError` says why not."""
        with tarfile.open(self.archive()) as found:
            folder.mkdir(parents=True, exist_ok=True)
            for member, name in files.items():
                file = found.extractfile(member) if member in found.getnames() else None
                if file is None:
                    raise CompileError(f"{self} has no {member}")
                (folder / name).write_bytes(file.read())

    def _pack(self, folder: Path) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise ToolchainMissing("npm is not installed", hint="install Node.js, which brings npm, and compile again")
        command = [npm, "pack", "--silent", "--ignore-scripts", str(self)]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = next(folder.glob("*.tgz"), None)
        if made.returncode or found is None:
            reason = " ".join((made.stderr or made.stdout).split())[:200]
            raise CompileError(f"npm pack {self} failed: {reason}", hint="check the network, and compile again")
        if (wrong := _sum(found)) != self.sha512:
            text = f"{self} has the sha512 {wrong}, expected {self.sha512}"
            raise CompileError(text, hint="the registry of npm is not to be trusted")
        return found


def _sum(path: Path) -> str:
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
