"""What is measured in a page: the works of the suite at the sizes of a page, for one and two threads, and the goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.suite.sizes import BERT, LLAMAS, SEQUENCE, parameters
from benchmarks.suite.works import BYTES_PER_WEIGHT, Goal, Work

CONTEXT = 256
"""Tokens in the caches at the middle of a decode block."""
STEPS = 32
PROMPT = 128
CACHE_BYTES = {"fp32": 4, "int8": 2, "int4": 2}
SHIPPED = "novels"
SHIPPED_SIZES = {
    "num_hidden_layers": 16, "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 512, "vocab_size": 4096,
}  # fmt: skip
"""Of examples/models/novels-7m."""
KINDS = ("decode", "prefill", "encode", "first-token")


@dataclass(frozen=True)
class PageWork(Work):
    """A work of the suite on `threads` threads; `shape` is S, B or the shipped language model."""

    threads: int = 1

    @property
    def sizes(self) -> dict[str, Any]:
        return SHIPPED_SIZES if self.shape == SHIPPED else BERT if self.shape == "B" else LLAMAS[self.shape]

    @property
    def layers(self) -> int:
        return int(self.sizes["num_hidden_layers"])

    @property
    def width(self) -> int:
        return int(self.sizes["hidden_size"])

    def weights(self) -> tuple[int, int]:
        """Of the linear layers of all blocks, and of the head."""
        if self.shape != SHIPPED:
            return parameters(self.shape)
        width, hidden = self.width, int(self.sizes["intermediate_size"])
        block = int(2 * width * width * (1 + self.shared)) + 3 * width * hidden
        return self.layers * block, width * int(self.sizes["vocab_size"])

    @property
    def shared(self) -> float:
        return float(self.sizes.get("num_key_value_heads", 1) / self.sizes["num_attention_heads"])

    def operations(self) -> float:
        """None for a decode step, which is held against reading alone."""
        linear, head = self.weights()
        if self.kind == "decode":
            return 0.0
        if self.kind == "encode":
            return 2.0 * SEQUENCE * linear + 4.0 * SEQUENCE * SEQUENCE * self.layers * self.width
        return 2.0 * (PROMPT * linear + head) + 2.0 * PROMPT * PROMPT * self.layers * self.width

    def read(self, precision: str) -> float:
        caches = 2.0 * CONTEXT * self.layers * self.width * self.shared * CACHE_BYTES[precision]
        return sum(self.weights()) * BYTES_PER_WEIGHT[precision] + (caches if self.kind == "decode" else 0)


ALL = ("int4", "int8", "fp32")
DECODE = {"int4": Goal(6.0, 0.5)}
WORKS = (
    PageWork("novels-decode", SHIPPED, "decode", ALL, goals=DECODE),
    PageWork("S-decode", "S", "decode", ALL, goals=DECODE),
    PageWork("S-prefill", "S", "prefill", ALL, goals={"int8": Goal(3.0)}),
    PageWork("B-encode", "B", "encode", ("int8", "fp32"), goals={"int8": Goal(2.5), "fp32": Goal(1.4)}),
)
"""B is of the shape of MiniLM-L6."""


def chosen(kinds: Sequence[str], threads: Sequence[int], names: Sequence[str] = ()) -> list[PageWork]:
    """Works of these kinds and beginnings of names (none: all), each at every number of threads."""
    works = [work for work in WORKS if not kinds or work.kind in kinds]
    works = [work for work in works if not names or work.name.startswith(tuple(names))]
    return [replace(work, name=f"{work.name}-{count}t", threads=count) for work in works for count in threads]
