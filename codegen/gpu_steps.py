"""Steps of a plan for GPUs that fusions change before they become launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sylvester.codegen.gpu_matmul import Linear, Norm
from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Extern, Pointer


@dataclass(frozen=True, kw_only=True)
class GpuProduct(Extern):
    """m rows of x, `x_row` apart, times a weight [n, k]; `pointers` by the names that its kernels give them."""

    form: Linear
    pointers: Mapping[str, Pointer]
    m: Index
    n: int
    k: int
    x_row: Index
    w_row: Index

    @property
    def y(self) -> str:
        return self.pointers["y"].buffer

    def changed(
        self, form: Linear, pointers: Mapping[str, Pointer], *, x_row: Index | None = None, label: str = ""
    ) -> GpuProduct:
        """It with other pointers beside its own."""
        return product_step(
            form, {**self.pointers, **pointers}, self.m, self.n, self.k, self.x_row if x_row is None else x_row,
            self.w_row, label=label or self.label, guard=self.guard,
        )  # fmt: skip


def product_step(
    form: Linear,
    pointers: Mapping[str, Pointer],
    m: Index,
    n: int,
    k: int,
    x_row: Index,
    w_row: Index,
    *,
    label: str = "",
    guard: str = "",
) -> GpuProduct:
    reads = tuple(p.buffer for name, p in pointers.items() if name != "y")
    return GpuProduct(
        "product", "", (), (pointers["y"].buffer,), reads, m * n * k, label=label, guard=guard, form=form,
        pointers=pointers, m=m, n=n, k=k, x_row=x_row, w_row=w_row,
    )  # fmt: skip


def rows_of(step: GpuProduct) -> tuple[object, ...]:
    """What tells the rows that a product multiplies from others, and how far apart those of its weight are."""
    read = (step.pointers.get(name) for name in ("x", "x_scales", "norm_weight", "norm_bias"))
    return (*read, step.m, step.k, step.x_row, step.w_row)


@dataclass(frozen=True, kw_only=True)
class GpuNorm(Extern):
    """y [m, k] of m rows of x, `x_row` apart; `pointers` by the names that kernels with a norm in them give them."""

    norm: Norm
    pointers: Mapping[str, Pointer]
    m: Index
    k: int
    x_row: Index

    @property
    def y(self) -> str:
        return self.pointers["y"].buffer


def norm_step(norm: Norm, pointers: Mapping[str, Pointer], m: Index, k: int, x_row: Index) -> GpuNorm:
    reads = tuple(p.buffer for name, p in pointers.items() if name != "y")
    return GpuNorm(
        "norm", "", (), (pointers["y"].buffer,), reads, m * k, norm=norm, pointers=pointers, m=m, k=k, x_row=x_row
    )  # fmt: skip
