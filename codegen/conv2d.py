"""Two-dimensional convolution with stride, padding, dilation and groups; one-dimensional ones have height 1."""

from __future__ import annotations

from dataclasses import dataclass

from sylvester.codegen.prelude import render


@dataclass(frozen=True)
class Conv2d:
    """The constants of one convolution; pairs are (height, width). Image sizes stay open until run time."""

    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if self.channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups {self.groups} must divide channels {self.channels} and {self.out_channels}")

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels == self.out_channels and self.groups > 1

    @property
    def pointwise(self) -> bool:
        """Whether output pixel p reads input pixel p and nothing else."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)


def conv2d(name: str, conv: Conv2d) -> str:
    """C text of one instance; `<name>_scratch` is the scratch it needs per thread."""
    pairs = {"K": conv.kernel, "S": conv.stride, "P": conv.padding, "D": conv.dilation}
    sizes = {key + axis: pair[i] for key, pair in pairs.items() for i, axis in enumerate("HW")}
    if conv.depthwise:
        return render("depthwise.c.in", NAME=name, C=conv.channels, **sizes)
    counts = {"C": conv.channels, "OC": conv.out_channels, "GROUPS": conv.groups}
    return render("conv2d.c.in", NAME=name, POINTWISE=int(conv.pointwise), **counts, **sizes)
