"""Two-dimensional convolution with stride, padding, dilation and groups; one-dimensional ones have height 1."""

from __future__ import annotations

from dataclasses import dataclass

from sylvester.codegen.prelude import render

UNROLLED = 64
"""Most weights of a depthwise kernel that are written out one by one."""


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


@dataclass(frozen=True)
class Finish:
    """Elementwise work on the result: C text of the new y[j], which may read other tensors p0, p1, ... at j."""

    value: str
    tensors: int = 0

    def fields(self) -> dict[str, str]:
        """How a template declares the other tensors, passes them on, and what it does to n results."""
        names = [f"p{i}" for i in range(self.tensors)]
        return {
            "PARAMETERS": "".join(f", const float *{p}" for p in names),
            "ARGUMENTS": "".join(f", {p}" for p in names),
            "SHIFTED": "".join(f", {p} + at" for p in names),
            "VALUE": self.value,
        }


NOTHING = Finish("y[j]")


def conv2d(name: str, conv: Conv2d, finish: Finish = NOTHING) -> str:
    """C text of one instance; `<name>_scratch` is the scratch it needs per thread.

    A depthwise one has `<name>_scratch(width of the input, height of the output)`.
    """
    pairs = {"K": conv.kernel, "S": conv.stride, "P": conv.padding, "D": conv.dilation}
    sizes = {key + axis: pair[i] for key, pair in pairs.items() for i, axis in enumerate("HW")}
    finishing = render("finish.c.in", NAME=name, **finish.fields())
    fields = {"NAME": name, "PARAMETERS": finish.fields()["PARAMETERS"], "ARGUMENTS": finish.fields()["ARGUMENTS"]}
    if conv.depthwise:
        unroll = "SV_UNROLL" if conv.kernel[0] * conv.kernel[1] <= UNROLLED else "SV_NO_UNROLL"
        return finishing + render("depthwise.c.in", C=conv.channels, UNROLL=unroll, **fields, **sizes)
    counts = {"C": conv.channels, "OC": conv.out_channels, "GROUPS": conv.groups}
    return finishing + render("conv2d.c.in", POINTWISE=int(conv.pointwise), **counts, **fields, **sizes)
