"""W -> the float weight that its rounding to b bits stands for, of every weight and width, made once per width."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.genome import EMBEDDING, FLOAT, LINEAR, Sites
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_round import OPS

Method = Literal["rtn", "mse", "gptq"]
FITTED = 4
"""Weights of so many bits or fewer are worth fitting."""
ROOM = 1 << 30
"""Bytes of widened weights that are kept."""
READERS: dict[Any, int] = {linear.target: bits for bits, (linear, _) in OPS.items() if isinstance(bits, int)}
Stored = tuple[int, tuple[Tensor, ...]]
WIDENED: dict[Any, int] = {widen.target: bits for bits, (_, widen) in OPS.items() if isinstance(bits, int)}


@dataclass
class RoundedWeights:
    """Each width is rounded by one `Quantize` over the whole program, so that it is what a uniform model would have."""

    program: Program
    sites: Sites
    method: Method = "mse"
    _made: dict[int, dict[str, Stored]] = field(default_factory=dict)
    _wide: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __call__(self, key: str, bits: int) -> Tensor | None:
        """The widened weight; None where this weight is not rounded."""
        if (key, bits) not in self._wide:
            found = self.stored(bits).get(key)
            if found is None:
                return None
            width, tensors = found
            wide: Tensor = OPS[width][1](*tensors)
            if sum(t.nbytes for t in self._wide.values()) > ROOM:
                self._wide.clear()
            self._wide[key, bits] = wide
        return self._wide[key, bits]

    def rounded(self, bits: int) -> frozenset[str]:
        """The weights that have these bits to choose from."""
        return frozenset(self.stored(bits))

    def nbytes(self, key: str, bits: int) -> int:
        """Bytes of the numbers and scales of a weight, or of the weight where it stays float."""
        found = self.stored(bits).get(key)
        return self.program.weights[key].nbytes if found is None else sum(t.nbytes for t in found[1])

    def stored(self, bits: int) -> dict[str, Stored]:
        """Per weight the bits it got and what is stored of it; a depth may take more bits than asked for."""
        if bits == FLOAT:
            return {}
        if bits not in self._made:
            method: Method = self.method if bits <= FITTED else "rtn"
            step = Quantize(weights=bits, method=method, embeddings=True)  # type: ignore[arg-type]
            rounded = Pipeline((step,), check=False)(_main_only(self.program))
            self._made[bits] = {
                key: (width, tuple(rounded.weights[name] for name in names))
                for key, (width, names) in replaced_weights(self.program, rounded).items()
            }
        return self._made[bits]


def _main_only(program: Program) -> Program:
    name = next(name for name, entry in program.entries.items() if entry is program.main)
    return Program(program.weights, {name: program.main}, program.state, program.info, program.calibration)


def replaced_weights(program: Program, rounded: Program) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Key of each weight that was rounded -> its bits, and the keys of the numbers and scales in its place."""
    pairs = zip(
        program.main.calls(LINEAR, EMBEDDING, *READERS), rounded.main.calls(LINEAR, EMBEDDING, *READERS), strict=True
    )
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for old, new in pairs:
        weight = arguments(old)["weight"]
        reader: fx.Node = arguments(new)["weight"] if new.target is EMBEDDING else new
        bits = (WIDENED if new.target is EMBEDDING else READERS).get(reader.target)
        if bits is not None and is_weight(weight):
            first = 0 if new.target is EMBEDDING else 1
            places = reader.args[first : first + (1 if bits == 16 else 2)]
            found[binding(weight).key] = bits, tuple(binding(n).key for n in places if isinstance(n, fx.Node))
    return found
