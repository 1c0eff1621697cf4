"""Named tensors with aliases: one stored copy however many names, entries or blocks use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sylvester.compiler.errors import CompileError

ALIAS_PREFIX = "alias:"


class ParameterStore(Mapping[str, Tensor]):
    """Key -> tensor. A tensor is replaced, never mutated, so clones share it by reference.

    Two names of one tensor are one key and an alias. `nbytes` counts each key once.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, aliases: Mapping[str, str] | None = None) -> None:
        self._tensors: dict[str, Tensor] = dict(tensors or {})
        self.aliases: dict[str, str] = dict(aliases or {})

    def __getitem__(self, key: str) -> Tensor:
        key = self.resolve(key)
        if key not in self._tensors:
            raise CompileError(
                f"no weight named {key!r}", hint=f"there are {len(self)} weights; see `list(program.weights)`"
            )
        return self._tensors[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._tensors[self.resolve(key)] = value.detach()

    def __delitem__(self, key: str) -> None:
        del self._tensors[key]
        self.aliases = {name: to for name, to in self.aliases.items() if to != key}

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.resolve(key) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def resolve(self, name: str) -> str:
        return self.aliases.get(name, name)

    def fresh(self, key: str) -> str:
        """A key that is not taken yet: `key`, or `key.2`, `key.3`, ..."""
        candidate, count = key, 1
        while candidate in self:
            count += 1
            candidate = f"{key}.{count}"
        return candidate

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def clone(self) -> ParameterStore:
        return ParameterStore(self._tensors, self.aliases)

    def save(self, path: Path) -> None:
        """Write one safetensors file; aliases go into its metadata. Tensors that overlap in memory are copied."""
        # A file with neither tensors nor metadata cannot be read back.
        metadata = {"format": "pt"} | {ALIAS_PREFIX + name: to for name, to in self.aliases.items()}
        storages = Counter(v.untyped_storage().data_ptr() for v in self._tensors.values())
        apart = {k: v.clone() if storages[v.untyped_storage().data_ptr()] > 1 else v for k, v in self._tensors.items()}
        save_file({k: v.contiguous() for k, v in apart.items()}, path, metadata=metadata)

    @staticmethod
    def load(*paths: Path) -> ParameterStore:
        """Read safetensors files; tensors stay mapped from the file until they are touched."""
        store = ParameterStore()
        for path in paths:
            with safe_open(path, framework="pt") as file:
                store._tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            store.aliases |= {
                k.removeprefix(ALIAS_PREFIX): v for k, v in metadata.items() if k.startswith(ALIAS_PREFIX)
            }
        return store


def merge_tied(tensors: Mapping[str, Tensor]) -> ParameterStore:
    """Names that hold the very same memory become one key and aliases."""
    store = ParameterStore()
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and place in seen:
            store.aliases[name] = seen[place]
        else:
            store[name] = tensor
            seen[place] = name
    return store
