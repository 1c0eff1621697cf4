"""What is measured on a GPU, the bytes and operations that bound it, and the goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.suite.sizes import LLAMAS, parameters
from benchmarks.suite.works import BYTES_PER_WEIGHT


@dataclass(frozen=True)
class Sizes:
    """Of all works: tokens of a prompt, tokens in the caches while decoding, and room in the caches."""

    prompt: int = 2048
    context: int = 1024
    capacity: int = 4096


@dataclass(frozen=True)
class Work:
    """`shape` is one of `LLAMAS`; `kind` "prefill" reads a prompt, "decode" one token of every row."""

    shape: str
    kind: str
    batch: int
    goals: Mapping[str, float] = field(default_factory=dict)
    """Precision -> times as fast as the best of PyTorch in bfloat16."""

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.kind}-{self.batch}"

    def operations(self, sizes: Sizes) -> float:
        """Multiplications and additions of products and attention; prompts have logits of their last token."""
        linear, head = parameters(self.shape)
        width = int(LLAMAS[self.shape]["num_hidden_layers"] * LLAMAS[self.shape]["hidden_size"])
        if self.kind == "decode":
            return self.batch * (2.0 * (linear + head) + 4.0 * (sizes.context + 1) * width)
        return self.batch * (2.0 * (sizes.prompt * linear + head) + 2.0 * sizes.prompt**2 * width)

    def bytes_read(self, precision: str, sizes: Sizes) -> float:
        """Weights, and caches of 16 bits while decoding, each once."""
        weights = sum(parameters(self.shape)) * BYTES_PER_WEIGHT["int8" if precision == "fp8" else precision]
        if self.kind != "decode":
            return weights
        settings = LLAMAS[self.shape]
        shared = settings["num_key_value_heads"] / settings["num_attention_heads"]
        return (
            weights
            + 4.0 * self.batch * sizes.context * settings["num_hidden_layers"] * settings["hidden_size"] * shared
        )


WORKS = tuple(
    Work(shape, kind, batch, {"int8": 1.2, "fp8": 1.2} if kind == "prefill" else {"int4": 2.0})
    for shape in ("L", "S")
    for kind in ("prefill", "decode")
    for batch in (1, 16)
)
BANDWIDTH_GOAL = 0.7
"""Of the measured bandwidth, while decoding."""
