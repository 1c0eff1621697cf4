"""AdamW with a warm-up and a cosine: gradients of the parts of a batch in threads, summed in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sylvester.compiler.batches import Part
from sylvester.compiler.errors import CompileError

WARMUP = 0.03
"""Part of the steps over which the rate grows."""
LARGEST = 1.0
"""Norm that the gradient is cut down to."""
BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")

Loss = Callable[[Mapping[str, Tensor], Part], Tensor]
"""Weights and a part of a batch -> what the part adds to the mean over the batch."""


@dataclass
class Descent:
    """Float32 copies of weights, which change with every step; `done` steps of `steps` are taken."""

    weights: dict[str, Tensor]
    steps: int
    learning_rate: float
    done: int = 0
    _adam: Any = field(init=False)

    def __post_init__(self) -> None:
        self.weights = {key: tensor.detach().float().clone() for key, tensor in self.weights.items()}
        self._adam = torch.optim.AdamW(self.weights.values(), lr=self.learning_rate, betas=BETAS, weight_decay=0.0)

    def rate(self) -> float:
        """Of the next step."""
        warmup = max(1, math.ceil(WARMUP * self.steps))
        if self.done < warmup:
            return self.learning_rate * (self.done + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.done - warmup) / max(1, self.steps - warmup)))

    def gradient(self, loss: Loss, parts: Sequence[Part], workers: Workers) -> float:
        """The loss at the weights as they are; its gradient is kept for `step`."""
        total = 0.0
        for tensor in self.weights.values():
            tensor.grad = None
        for value, gradients in workers.map(lambda part: self._part(loss, part), parts):
            total += value
            for tensor, gradient in zip(self.weights.values(), gradients, strict=True):
                if gradient is not None:
                    tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        return total

    def _part(self, loss: Loss, part: Part) -> tuple[float, tuple[Tensor | None, ...]]:
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self.weights.items()}
        with torch.enable_grad():
            found = loss(leaves, part)
        if not found.requires_grad:
            raise CompileError("no weight has a gradient: rounding stands between all of them and the outputs")
        return float(found.detach()), torch.autograd.grad(found, list(leaves.values()), allow_unused=True)

    def step(self) -> None:
        """Change the weights by the gradient."""
        torch.nn.utils.clip_grad_norm_(self.weights.values(), LARGEST)
        for group in self._adam.param_groups:
            group["lr"] = self.rate()
        self._adam.step()
        self.done += 1

    def idle(self) -> list[str]:
        """Keys that no gradient has reached in the steps so far."""
        return [key for key, tensor in self.weights.items() if tensor not in self._adam.state]

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, but `done`."""
        found = {f"weight/{key}": tensor for key, tensor in self.weights.items()}
        for key, tensor in self.weights.items():
            known = self._adam.state.get(tensor, {})
            found |= {f"{name}/{key}": known[name] for name in MOMENTS if name in known}
        return found

    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        self.done = done
        for key, tensor in self.weights.items():
            tensor.copy_(state[f"weight/{key}"])
            if f"{MOMENTS[0]}/{key}" in state:
                moments = {name: state[f"{name}/{key}"].to(tensor.device, copy=True) for name in MOMENTS}
                self._adam.state[tensor] = {"step": torch.tensor(float(done)), **moments}


@dataclass(frozen=True)
class Workers:
    """Threads that each take whole parts, which wait for each other less than threads within an operation do."""

    pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Part], Any], parts: Sequence[Part]) -> Iterator[Any]:
        return map(function, parts) if self.pool is None else self.pool.map(function, parts)


@contextmanager
def workers(parts: int) -> Iterator[Workers]:
    """As many threads as PyTorch may use, at most one for each part."""
    allowed = torch.get_num_threads()
    count = min(allowed, parts)
    if count < 2:
        yield Workers()
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(allowed // count,)) as pool:
            yield Workers(pool)
    finally:
        torch.set_num_threads(allowed)
