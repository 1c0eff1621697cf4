"""The works: what is measured, at which precisions, the goals, and the bytes and operations that bound the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.suite.sizes import BERT, CONTEXT, LLAMAS, PROMPT, SEQUENCE, parameters

PRECISIONS = ("int4", "int8", "bf16", "fp32")
"""From the lowest up: a row is compared with the peers at its own precision and above."""

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
"""int4 with a 16-bit scale for 32 weights."""


@dataclass(frozen=True)
class Goal:
    """`peers`: times as fast as the best peer; `limit`: fraction of the bound."""

    peers: float
    limit: float | None = None


@dataclass(frozen=True)
class Work:
    """`kind`: decode (one token at CONTEXT), prefill (PROMPT tokens), encode (SEQUENCE tokens), zoo (whole models)."""

    name: str
    shape: str
    kind: str
    precisions: tuple[str, ...]
    batch: int = 1
    goals: Mapping[str, Goal] = field(default_factory=dict)

    def operations(self) -> float:
        """Multiplications and additions of the matrix products and the attention."""
        if self.kind == "zoo":
            return 0.0
        linear, head = parameters(self.shape)
        if self.kind == "encode":
            tokens = self.batch * SEQUENCE
            return 2 * tokens * linear + 4.0 * tokens * SEQUENCE * self.layers * self.width
        if self.kind == "decode":
            return 2.0 * (linear + head) + 4 * (CONTEXT + 1) * self.layers * self.width
        return 2.0 * (PROMPT * linear + head) + 2.0 * PROMPT * PROMPT * self.layers * self.width

    def read(self, precision: str) -> float:
        """Bytes of weights and caches that have to be read once."""
        if self.kind == "zoo":
            return 0.0
        weights = sum(parameters(self.shape)) * BYTES_PER_WEIGHT[precision]
        return weights + (self.cache_values() * (4 if precision == "fp32" else 2) if self.kind == "decode" else 0)

    def cache_values(self) -> float:
        sizes = LLAMAS[self.shape]
        shared = sizes["num_key_value_heads"] / sizes["num_attention_heads"]
        return 2.0 * CONTEXT * self.layers * self.width * shared

    @property
    def layers(self) -> int:
        return int((BERT if self.shape == "B" else LLAMAS[self.shape])["num_hidden_layers"])

    @property
    def width(self) -> int:
        return int((BERT if self.shape == "B" else LLAMAS[self.shape])["hidden_size"])


ENCODE_GOALS = {"bf16": Goal(1.7), "int8": Goal(2.0)}
FULL = [
    Work("S-decode", "S", "decode", PRECISIONS[::-1], goals={"int4": Goal(2.0, 0.5), "int8": Goal(1.8, 0.6)}),
    Work(
        "S-prefill", "S", "prefill", ("fp32", "bf16", "int8"), goals={"bf16": Goal(1.7, 0.25), "int8": Goal(2.5, 0.2)}
    ),
    Work("L-decode", "L", "decode", ("int8", "int4"), goals={"int4": Goal(1.5, 0.75)}),
    Work("B-encode-1", "B", "encode", ("fp32", "bf16", "int8"), goals=ENCODE_GOALS),
    Work("B-encode-8", "B", "encode", ("fp32", "bf16", "int8"), batch=8, goals=ENCODE_GOALS),
]


def find(name: str) -> Work:
    """The work of this name; `zoo-...` is a model of tests/zoo.py, `vision-...` an image model of real size."""
    known = {work.name: work for work in FULL}
    return known[name] if name in known else whole_model(*name.split("-", 1))


def whole_model(kind: str, model: str) -> Work:
    return Work(f"{kind}-{model}", model, "zoo", ("fp32",), goals={"fp32": Goal(1.0)})


def chosen(names: Sequence[str]) -> list[Work]:
    """Works whose name is given or starts with a given part: `zoo` is every zoo model,
    `vision` every image model. Nothing given: all."""
    works = list(FULL)
    if not names or any(name.startswith(("zoo", "vision")) for name in names):
        from benchmarks.suite.vision import IMAGES
        from tests import zoo

        works += [whole_model("zoo", model) for model in zoo.NAMES]
        works += [whole_model("vision", model) for model in IMAGES]
    for name in names:
        if not any(_fits(work, name) for work in works):
            known = ", ".join(w.name for w in works)
            raise ValueError(f"no work {name!r}, expected one of {known}, zoo, zoo-MODEL, vision, vision-MODEL")
    return [work for work in works if not names or any(_fits(work, name) for name in names)]


def _fits(work: Work, name: str) -> bool:
    return work.name == name or work.name.startswith(f"{name}-")
