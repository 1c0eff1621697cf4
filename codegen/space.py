"""What a kernel may be tuned over: a space of candidates, and the problems it is tuned for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ROW_CLASSES = ((1, 1), (8, 4), (63, 32))
"""(most rows, rows measured): one row, a small batch, a block. More rows are a prefill, measured at PREFILL_ROWS."""
PREFILL_ROWS = 256


@dataclass(frozen=True)
class Candidate:
    """One way to build a kernel: values of C macros that differ from the defaults. Its text identifies it."""

    parameters: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(sorted(self.parameters.items()))))

    def __hash__(self) -> int:
        return hash(tuple(self.parameters.items()))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.parameters.items()) or "default"


@dataclass(frozen=True)
class Space:
    """The candidates of a family; the first is the default."""

    family: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"the space of {self.family} needs distinct candidates, found {len(self.candidates)}")

    @property
    def default(self) -> Candidate:
        return self.candidates[0]

    @staticmethod
    def of(family: str, *alternatives: Mapping[str, int]) -> Space:
        """The default without any macro, then the alternatives."""
        return Space(family, (Candidate(), *map(Candidate, alternatives)))


@dataclass(frozen=True)
class Problem:
    """What a kernel is tuned for. `shape`: (m, n, k) of a linear layer, or (queries, keys, heads, kv heads, width)."""

    family: str
    format: str
    shape: tuple[int, ...]
    dtype: str = "f32"

    def __str__(self) -> str:
        return f"{self.family} {self.format} {'x'.join(map(str, self.shape))} {self.dtype}"

    @staticmethod
    def linear(form: str, m: int, n: int, k: int) -> Problem:
        """A linear layer with m rows, as the representative of its row class."""
        return Problem("linear", form, (row_class(m), n, k))


def row_class(m: int) -> int:
    """The number of rows that stands for m rows in the database."""
    return next((rows for most, rows in ROW_CLASSES if m <= most), PREFILL_ROWS)
