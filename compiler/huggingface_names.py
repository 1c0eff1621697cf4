"""Names of a program's weights in the architecture it was made from, found by walking both graphs side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface_parts import descendants
from sylvester.compiler.huggingface_sites import Sites
from sylvester.compiler.layers import find_layers
from sylvester.compiler.lockstep import matching_weights
from sylvester.compiler.program import Program, binding, is_weight

HINT = (
    "leave out what made it: a folder can say weights in bfloat16 or whole numbers, folded rotations "
    "(RotateHadamard(ffn=False, online=False)), skipped parts and shared tensors"
)


@dataclass(frozen=True)
class Naming:
    """`state` has the tensors of the architecture by name; `whole` is its capture, `left` lacks the dropped parts.

    `tied` are the aliases of the architecture itself; `sites` says, after `stored`, where the program stands for it.
    """

    state: Mapping[str, Tensor]
    whole: Program
    left: Program
    program: Program
    tied: Mapping[str, str] = field(default_factory=dict)
    sites: Sites = field(default_factory=Sites)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Every tensor that is left, once, under its name; and aliases: name -> the name it is stored under."""
        tensors: dict[str, Tensor] = {}
        first: dict[tuple[str, str], str] = {}
        aliases: dict[str, str] = {}
        pairs = self._pairs()
        # A tensor is stored under the name it had, where that name still reads it.
        for key, own in sorted(pairs.items(), key=lambda pair: pair[0] != pair[1]):
            name = self._origin(key)
            if name is None:
                self._require_equal(key, own)
                continue
            tensor = self._plain(key, own, name)
            known = first.setdefault((own, key.removeprefix(name)), name)
            if known == name:
                tensors.setdefault(name, tensor.contiguous())
            elif name not in tensors:
                aliases[name] = known
        for name, own in self._rounded():
            if (known := first.setdefault((own, ""), name)) == name:
                tensors[name] = self.program.weights[own].contiguous()
            else:
                aliases[name] = known
        tensors |= dict(self._neutral(pairs)) | {name: self.state[name].contiguous() for name in self._unread()}
        return tensors, aliases | self._tied(tensors, aliases)

    def copies(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors for the aliases that the architecture does not share by itself."""
        return {name: tensors[to].clone() for name, to in aliases.items() if name not in self.tied}

    def zeros(self, dropped: Mapping[str, list[int]]) -> dict[str, Tensor]:
        """Zeros for what the dropped parts write with: such a part adds nothing."""
        found: dict[str, Tensor] = {}
        layers = find_layers(self.whole)
        for kind, numbers in dropped.items():
            parts = [part for n in numbers for part, _ in layers[n].main.of_kind(kind)]
            operands = (u for part in parts for writer in part.writers for u in writer.all_input_nodes)
            names = [self._origin(binding(u).key) for u in operands if is_weight(u)]
            found |= {name: torch.zeros_like(self.state[name]).contiguous() for name in names if name}
        return found

    def _pairs(self) -> dict[str, str]:
        try:
            return matching_weights(self.left, self.program, self.sites.stand_in)
        except CompileError as error:
            raise CompileError(f"the program does not fit the architecture: {error.message}", hint=HINT) from error

    def _rounded(self) -> Iterator[tuple[str, str]]:
        """Names of tensors of rounded weights and their keys, first those of the modules they were made from."""
        made = [(n, f"{n}.{end}", own) for n, (_, keys) in self.sites.quantised.items() for end, own in keys.items()]
        for _, name, own in sorted(made, key=lambda item: not item[2].startswith(f"{item[0]}.")):
            yield name, own

    def _neutral(self, pairs: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Weights of norms that the program does without."""
        for key, number in self.sites.neutral.items():
            if key not in self.state or key in pairs:
                raise CompileError(
                    f"the norm of {key!r} was folded, which the architecture cannot say of it", hint=HINT
                )
            yield key, torch.full_like(self.state[key], number).contiguous()

    def _origin(self, key: str) -> str | None:
        """The tensor of the architecture that a captured weight is, or was computed from first."""
        parts = key.split(".")
        names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((name for name in names if name in self.state), None)

    def _plain(self, key: str, own: str, name: str) -> Tensor:
        """The program's tensor as the architecture stores it."""
        tensor, original = self.program.weights[own], self.state[name]
        if key == name:
            if tensor.shape != original.shape or tensor.dtype != original.dtype:
                found, expected = (f"{t.dtype}{list(t.shape)}" for t in (tensor, original))
                raise CompileError(f"weight {own!r} is {found}, the architecture has {expected}", hint=HINT)
            return tensor
        captured = self.left.weights[key]
        if captured.ndim == 2 and captured.shape == original.t().shape and torch.equal(captured, original.t()):
            return tensor.t()
        source = self._origin(own)
        same_way = source is not None and own.removeprefix(source) == key.removeprefix(name)
        if source and same_way and own in self.whole.weights and torch.equal(self.whole.weights[own], tensor):
            return self.state[source]
        raise CompileError(
            f"weight {own!r} was changed, and the architecture computes {key!r} from {name!r}", hint=HINT
        )

    def _require_equal(self, key: str, own: str) -> None:
        """Tensors that no file holds must be what the architecture computes."""
        if not torch.equal(self.left.weights[key], self.program.weights[own]):
            raise CompileError(f"{own!r} was changed; the architecture computes it and stores none", hint=HINT)

    def _unread(self) -> Iterator[str]:
        """Stored tensors that the graph never reads as such, as where two are folded into one."""
        return (name for name in self.state if not descendants(self.whole, name))

    def _tied(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, str]:
        """Names that the architecture itself gives to one tensor and that nothing reads by themselves."""
        known = {name: to for name, to in self.whole.weights.aliases.items() if to in tensors or to in aliases}
        return {name: aliases.get(to, to) for name, to in known.items() if name in self.state}
