"""The launches that linear layers become on a GPU: for one row, for a few and for many, whichever fits the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sylvester.codegen import gpu_norms, gpu_rows, gpu_sparse
from sylvester.codegen.gpu_architectures import smallest
from sylvester.codegen.gpu_lowering import NO_LIMIT, Candidate, Given, GpuLowering, When, over
from sylvester.codegen.gpu_matmul import (
    APART,
    FINISH_M,
    FINISH_N,
    MOST_ROWS,
    WAYS,
    Norm,
    Tile,
    finish,
    gemv_group,
    kernel,
)
from sylvester.codegen.gpu_matmul_space import gemv_tiles, tiles
from sylvester.codegen.gpu_steps import GpuNorm, GpuProduct, rows_of
from sylvester.codegen.index import Index, index, sum_of
from sylvester.codegen.lazy import Pointer, Step
from sylvester.codegen.reads import step_reads, step_writes

MANY = 512
"""Rows that the kernel for many is cut up for where their number is not known."""
FEW = ((1, 1), (2, MOST_ROWS))
"""The least and the most rows of the kernels without tensor cores."""
MORE = ((MOST_ROWS + 1, 64), (65, NO_LIMIT))
"""Of those on tensor cores."""
STEADY = ((1, 64), (65, NO_LIMIT))
"""Of those where few rows must have the bits that each has alone: one kernel is for all of them."""
NEAR = 8
"""Steps among which products are joined."""
Rows = dict[str, Pointer]


def launch_steps(lowering: GpuLowering) -> None:
    """Products of the plan become launches."""
    steps, lowering.plan.steps = lowering.plan.steps, []
    launches = _Launches(lowering)
    for run in _runs(steps):
        launches.add(run)


class _Launches:
    """Rows are rounded once for all products of many rows that read them."""

    def __init__(self, lowering: GpuLowering) -> None:
        self.lowering = lowering
        self.rows: dict[tuple[Any, ...], Rows] = {}

    def add(self, run: Sequence[Step]) -> None:
        """One step, or products that run together."""
        step, steps = run[0], self.lowering.plan.steps
        written = set().union(*map(step_writes, run))
        self.rows = {key: rows for key, rows in self.rows.items() if key[0].buffer not in written}
        if not isinstance(step, (GpuProduct, GpuNorm)):
            steps.append(step)
            return
        before = len(steps)
        if isinstance(step, GpuNorm):
            self._norm(step, step.norm, step.pointers)
        else:
            self._products([product for product in run if isinstance(product, GpuProduct)])
        labels = {product.y: product.label for product in run if isinstance(product, GpuProduct)}
        for number, made in enumerate(steps[before:], before):
            label = "; ".join(labels[name] for name in step_writes(made) if name in labels) or step.label
            steps[number] = replace(made, label=label, guard=step.guard)

    def _products(self, run: Sequence[GpuProduct]) -> None:
        m = run[0].m
        for least, most in () if self.lowering.steady else FEW:
            if _may(m, least, most) and not self._together(run, (m, least, most)):
                for step in run:
                    self._few(step, (m, least, most))
        for step in run:
            for least, most in STEADY if self.lowering.steady else MORE:
                if _may(m, least, most):
                    self._many(step, (m, least, most))

    def _together(self, run: Sequence[GpuProduct], when: When) -> bool:
        """One launch for all products of a run; none where programs should share the depth."""
        first, n = run[0], [index(step.n) for step in run]
        options = gemv_tiles(first.form, when[2], sum(step.n for step in run), first.k)
        if len(run) == 1 or options[0].splits > 1:
            return False
        given = {**_arguments(first), **{f"{name}_{way}": index(0) for name in APART for way in WAYS}}
        for way, step in zip(WAYS, (*run[1:], first), strict=False):
            own = _arguments(step)
            given |= {f"{name}_{way}": own[name] for name in APART if name in own}
        if len(run) == 2:
            given["n_c"] = index(0)

        def candidate(tile: Tile) -> Candidate:
            made = gemv_group(first.form, tile, when[2], first.k)
            return Candidate(made, (sum_of(over(columns, tile.n) for columns in n), index(1)))

        options = tuple(tile for tile in options if tile.splits == 1)
        self.lowering.tuned(options, candidate, given, tuple(step.y for step in run), when)
        return True

    def _few(self, step: GpuProduct, when: When) -> None:
        def candidate(tile: Tile) -> Candidate:
            made = gpu_sparse.few(step.form, tile, when[2], step.k)
            return Candidate(made, (over(index(step.n), tile.n), index(tile.splits)))

        self._tiled(step, when, gpu_sparse.few_tiles(step.form, when[2], step.n, step.k), candidate)

    def _many(self, step: GpuProduct, when: When) -> None:
        if step.form.rounding in ("rows", "step"):
            form = replace(step.form, x=step.form.type, rounding="given", norm=None)
            step = step.changed(form, self._once(step, self._rounded), x_row=index(step.k))
        elif step.form.norm:
            form = replace(step.form, norm=None)
            step = step.changed(form, self._once(step, self._normalised), x_row=index(step.k))

        def candidate(tile: Tile) -> Candidate:
            made = kernel(step.form, tile, step.k)
            return Candidate(made, (over(step.m, tile.m) * over(index(step.n), tile.n), index(tile.splits)))

        most = step.m.constant or min(when[2], MANY)
        self._tiled(step, when, tiles(step.form, most, step.n, step.k, smallest(self.lowering.archs)), candidate)
        if step.form.opening:
            grid = (over(step.m, FINISH_M), over(index(step.n), FINISH_N))
            made = gpu_sparse.opening(step.form)
            self.lowering.launch(made, grid, _arguments(step), (step.y,), when, changes=True)

    def _tiled(
        self, step: GpuProduct, when: When, options: Sequence[Tile], candidate: Callable[[Tile], Candidate]
    ) -> None:
        """Where few programs would run they share the depth, and a launch after them adds up their parts."""
        splits, given, rows = options[0].splits, _arguments(step), step.m.constant or when[2]
        splits = splits if rows < NO_LIMIT else 1
        options = [replace(tile, splits=splits) for tile in options]
        if splits == 1:
            self.lowering.tuned(options, candidate, given, (step.y,), when)
            return
        kinds, m, n = 2 if step.form.gated else 1, index(rows), index(step.n)
        parts = self.lowering.buffer("arena", (index(splits * kinds), m, n), "f32")
        place = Pointer(parts.name, index(0))
        self.lowering.tuned(options, candidate, {**given, "y": place}, (parts.name,), when)
        grid = (over(step.m, FINISH_M), over(n, FINISH_N))
        self.lowering.launch(finish(step.form, splits), grid, {**given, "parts": place}, (step.y,), when)

    def _once(self, step: GpuProduct, make: Callable[[GpuProduct, When], Rows]) -> Rows:
        """What is made of more than a few rows, which another product may have made."""
        form = step.form
        read = (step.pointers.get(name) for name in ("x", "x_scales", "norm_weight", "norm_bias"))
        key = (*read, step.x_row, step.m, form.norm, form.type, form.bits, form.rounding, step.guard)
        if key not in self.rows:
            self.rows[key] = make(step, (step.m, 1 if self.lowering.steady else MOST_ROWS + 1, NO_LIMIT))
        return self.rows[key]

    def _rounded(self, step: GpuProduct, when: When) -> Rows:
        form, m, k = step.form, step.m, step.k
        held = "i8" if form.whole else "fp8"
        numbers, scales = (self.lowering.buffer("arena", s, t) for s, t in (((m, index(k)), held), ((m,), "f32")))
        rows = {"x": Pointer(numbers.name, index(0), held), "x_scales": Pointer(scales.name, index(0))}
        given: dict[str, Given] = {**step.pointers, "numbers": rows["x"], "scales": rows["x_scales"]}
        given |= {"m": m, "k": index(k), "x_row": step.x_row, "numbers_row": index(k)}
        if form.rounding == "step":
            given["step"] = step.pointers["x_scales"]
        options = gpu_rows.candidates("fp32", k, form.norm, form.bits, form.rounding == "step", form.type)
        grid = (over(m, gpu_rows.rows_of(k)),)
        self.lowering.tuned(options, lambda made: Candidate(made, grid), given, (numbers.name, scales.name), when)
        return rows

    def _normalised(self, step: GpuProduct, when: When) -> Rows:
        assert step.form.norm is not None
        y = self.lowering.buffer("arena", (step.m, index(step.k)), "f32")
        rows = {"x": Pointer(y.name, index(0))}
        self._norm(step, step.form.norm, {**step.pointers, "y": rows["x"]}, when)
        return rows

    def _norm(
        self, step: GpuProduct | GpuNorm, norm: Norm, pointers: Mapping[str, Pointer], when: When | None = None
    ) -> None:
        """Of the rows that a step reads."""
        held = {name: "f32" if getattr(norm, name) else None for name in ("weight", "bias")}
        made = gpu_norms.norm(norm.kind, step.k, "f32", weight=held["weight"], bias=held["bias"])
        given: dict[str, Given] = {"y": pointers["y"], "x": pointers["x"], "rows": step.m, "n": index(step.k)}
        given |= {"x_row": step.x_row, "eps": float(norm.eps)}
        given |= {name: pointers[f"norm_{name}"] for name, dtype in held.items() if dtype}
        grid = (over(step.m, gpu_norms.rows_of(step.k)),)
        self.lowering.launch(made, grid, given, (pointers["y"].buffer,), when)


def _runs(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Products of the same rows by weights of one form, three at most, which may come before steps that are near; and
    single steps."""
    rest = list(steps)
    while rest:
        run = [rest.pop(0)]
        passed: list[Step] = []
        for step in rest[:NEAR] if isinstance(run[0], GpuProduct) else ():
            if len(run) <= len(WAYS) and _joins(run, step) and not any(_ordered(other, step) for other in passed):
                run.append(step)
            else:
                passed.append(step)
        rest[:NEAR] = passed if len(run) > 1 else rest[:NEAR]
        yield run


def _ordered(first: Step, second: Step) -> bool:
    """Whether a step must come after another."""
    return bool(
        step_writes(first) & (step_reads(second) | step_writes(second)) or step_reads(first) & step_writes(second)
    )


def _joins(run: Sequence[Step], step: Step) -> bool:
    first = run[0]
    if not isinstance(first, GpuProduct) or not isinstance(step, GpuProduct) or first.form != first.form.plain:
        return False
    apart = not first.form.turned and not any(_ordered(other, step) for other in run)
    return apart and step.form == first.form and step.guard == first.guard and rows_of(step) == rows_of(first)


def _arguments(step: GpuProduct) -> dict[str, Given]:
    sizes = {"m": step.m, "n": index(step.n), "k": index(step.k), "x_row": step.x_row, "w_row": step.w_row}
    return {**step.pointers, **sizes, "y_row": index(step.n), "residual_row": index(step.n)}


def _may(m: Index, least: int, most: int) -> bool:
    return m.constant is None or least <= m.constant <= most
