"""A stack of small blocks with weights that share much, for the passes that share weights."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylvester as sv
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.program import Program

WIDTH, HIDDEN, BLOCKS = 32, 64, 4


class Block(nn.Module):
    """x + o(attention(q, k, v)), then x + down(relu(up))."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.a, self.b, self.c, self.d = (nn.Linear(width, width, bias=i % 2 == 0) for i in range(4))
        self.e, self.f = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (m(x).view(b, t, self.heads, w // self.heads).transpose(1, 2) for m in (self.a, self.b, self.c))
        x = x + self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, w))
        return x + self.f(torch.relu(self.e(x)))


class Tower(nn.Module):
    """Blocks whose matrices are a common one plus a little of their own."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        with torch.no_grad():
            for parameters in zip(*(block.parameters() for block in self.blocks), strict=True):
                common = torch.randn_like(parameters[0])
                for p in parameters:
                    p.copy_(0.08 * (common + 0.5 * torch.randn_like(p)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@functools.cache
def _traced() -> Program:
    return sv.trace(Tower().eval(), (torch.randn(2, 5, WIDTH),))


def tower(samples: int = 0) -> Program:
    """The traced tower; with samples whose features are of very different sizes as calibration data."""
    program = _traced().clone()
    if samples:
        name = next(iter(program.main.examples))
        program.calibration = Calibration(tuple({name: x} for x in inputs(samples)), ())
    return program


def inputs(count: int, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0.3, -2, WIDTH)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)))[0]
    return [torch.randn(2, 9, WIDTH, generator=random) * sizes @ mix for _ in range(count)]
