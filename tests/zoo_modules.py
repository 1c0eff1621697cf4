"""Hand-written models of the zoo: torch.nn transformers, CNNs, an MLP and a decoder that no name can give away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 199


class TorchEncoder(nn.Module):
    """Pre-norm torch.nn.TransformerEncoder over embedded tokens, with GELU."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, 6, 104, activation="gelu", batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(VOCAB, width)
        self.encoder = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(input_ids)))


class TorchDecoder(nn.Module):
    """Post-norm torch.nn.TransformerDecoder with ReLU: a causal target attends to `memory`, (batch, source, width)."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 6, 104, batch_first=True), depth)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.decoder(self.embedding(target), memory, tgt_mask=mask, tgt_is_causal=True))


class Shuttle(nn.Module):
    """Causal self-attention with one fused projection and rotary positions written out by hand."""

    def __init__(self, width: int, threads: int) -> None:
        super().__init__()
        self.threads = threads
        self.gain = nn.Parameter(torch.ones(width))
        self.warp = nn.Linear(width, 3 * width, bias=False)
        self.weft = nn.Linear(width, width)

    def forward(self, cloth: Tensor) -> Tensor:
        batch, length, width = cloth.shape
        pulled = self.warp(scaled_to_unit(cloth, self.gain)).view(batch, length, 3, self.threads, -1)
        a, b, c = pulled.permute(2, 0, 3, 1, 4)
        a, b = turned(a), turned(b)
        score = a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        picked = score.masked_fill(future, float("-inf")).softmax(-1) @ c
        return self.weft(picked.transpose(1, 2).reshape(batch, length, width))


class Comb(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, width: int, teeth: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.open = nn.Linear(width, teeth)
        self.close = nn.Linear(teeth, width)

    def forward(self, cloth: Tensor) -> Tensor:
        return self.close(F.relu(self.open(scaled_to_unit(cloth, self.gain))).square())


class Weaver(nn.Module):
    """A decoder-only language model; the output matrix is the embedding."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.yarn = nn.Embedding(VOCAB, width)
        self.loom = nn.ModuleList(nn.ModuleList((Shuttle(width, 3), Comb(width, 88))) for _ in range(depth))
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, pieces: Tensor) -> Tensor:
        cloth = self.yarn(pieces)
        for shuttle, comb in self.loom:
            cloth = cloth + shuttle(cloth)
            cloth = cloth + comb(cloth)
        return scaled_to_unit(cloth, self.gain) @ self.yarn.weight.T


def scaled_to_unit(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * gain


def turned(x: Tensor) -> Tensor:
    """Rotate the neighbouring pairs (0, 1), (2, 3), ... of the last axis by position times frequency."""
    length, size = x.shape[-2:]
    angle = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1).flatten(-2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut; a change of size goes through a 1x1 convolution."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.down = nn.Identity()
        if stride != 1 or inside != outside:
            self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class ResNet(nn.Module):
    """Stem with max pooling, three equal blocks, then a down-sampling block and its two repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stage1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))
        self.stage2 = nn.Sequential(BasicBlock(16, 24, 2), BasicBlock(24, 24), BasicBlock(24, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(pixel_values)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ChannelsLast(nn.Module):
    """LayerNorm over the channels of (batch, channel, height, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, 4x GELU bottleneck, per-channel scale, shortcut (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.scale * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patchify stem, stages of three and two blocks, a down-sampling convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 2, 2), ChannelsLast(16))
        self.stage1 = nn.Sequential(*(ConvNeXtBlock(16) for _ in range(3)))
        self.shrink = nn.Sequential(ChannelsLast(16), nn.Conv2d(16, 24, 2, 2))
        self.stage2 = nn.Sequential(*(ConvNeXtBlock(24) for _ in range(2)))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stage2(self.shrink(self.stage1(self.stem(pixel_values))))
        return self.head(self.norm(x.mean((-2, -1))))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (Sandler et al. 2018); the shortcut needs equal sizes."""

    def __init__(self, inside: int, outside: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        hidden = 3 * inside
        self.shortcut = stride == 1 and inside == outside
        self.body = nn.Sequential(
            nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), act(),
            nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNet(nn.Module):
    """ReLU6 inverted residuals, then Hardswish ones, two and three of them with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish())
        self.stage1 = nn.Sequential(*(InvertedResidual(12, 12, 1, nn.ReLU6) for _ in range(2)))
        self.shrink = InvertedResidual(12, 16, 2, nn.ReLU6)
        self.stage2 = nn.Sequential(*(InvertedResidual(16, 16, 1, nn.Hardswish) for _ in range(3)))
        self.pool = nn.AvgPool2d(5)
        self.head = nn.Linear(16, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stage2(self.shrink(self.stage1(self.stem(pixel_values))))
        return self.head(self.pool(x).flatten(1))


class Mlp(nn.Module):
    """Four plain matrices with different activations, no residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(23, 48), nn.ReLU(), nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 40), nn.Tanh(), nn.Dropout(0.1)
        )
        self.head = nn.Linear(40, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.body(x)))
