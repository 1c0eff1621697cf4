"""A small language model trains in int8 as it does in float, and outliers cost what the rotations spread."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylvester as sv

TEXT = Path(__file__).parent.parent / "examples/data/wuthering-heights.txt"
WIDTH, LENGTH, BATCH, LAST = 64, 64, 8, 20
OUTLIERS = (3, 17, 40)


class Block(nn.Module):
    """Attention and a gated FFN, in which features can be scaled without a change of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")
        self.gate, self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).view(*x.shape[:2], 4, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Bytes(nn.Module):
    """A language model over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(128, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def with_outliers(model: Bytes, times: float) -> Bytes:
    """The same function, some features of whose layers are `times` as large."""
    with torch.no_grad():
        for block in model.blocks:
            for large, small in ((block.up, block.down), (block.v, block.o)):
                for row in OUTLIERS:
                    large.weight[row] *= times
                    large.bias[row] *= times
                    small.weight[:, row] /= times
    return model


def trained(module: nn.Module, steps: int) -> float:
    """Mean loss of the last steps; all runs see the same text."""
    text = torch.tensor(list(TEXT.read_bytes())).clamp(max=127)
    random = torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.AdamW(module.parameters(), 3e-3), []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=random)
        ids = torch.stack([text[at : at + LENGTH] for at in starts])
        loss = F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-LAST:]) / LAST


@pytest.mark.parametrize("steps", [50, pytest.param(300, marks=pytest.mark.nightly)])
def test_it_trains_as_in_float(steps):
    model, ids = Bytes(), torch.zeros(2, LENGTH, dtype=torch.int64)
    expected = trained(copy.deepcopy(model), steps)
    assert trained(sv.halo(copy.deepcopy(model), (ids,), 2, "int8"), steps) <= 1.03 * expected
    large = with_outliers(copy.deepcopy(model), 100)
    torch.testing.assert_close(large(ids), model(ids))
    plain, turned = (trained(sv.halo(copy.deepcopy(large), (ids,), level, "int8"), steps) for level in (0, 2))
    assert turned < plain
