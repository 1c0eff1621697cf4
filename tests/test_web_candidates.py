"""Micro-kernels that a page chooses from: few enough to time, no data of their own, the results of the default."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import wasmtime

import sylvester as sv
from sylvester.backends.toolchain import build_shared
from sylvester.codegen.compile import compile_program
from sylvester.codegen.formats import format_headers
from sylvester.codegen.isa import AVX2, RELAXED, SIMD128, THREADED
from sylvester.codegen.layout import Format
from sylvester.codegen.linear import record_bytes
from sylvester.codegen.web_candidates import CLASSES, FORMATS, choices, every, module, space
from sylvester.codegen.web_problems import PanelProblem, ranked
from tests.kernel_harness import export, load, run, team
from tests.test_kernels_steady import packed
from tests.webassembly import engine

MOST = 64
FORMS = (Format("f32"), Format("q8"), Format("q8", 32), Format("q4", 32), Format("q3", 64))
STACK = 250 << 20
"""Where that of a module of candidates ends."""
# p: y, x, panel, bias, row records; i: the kernel, m, columns of y, columns, k, group, whether there is a bias
BODY = """
    sv_product o = {.rows = p[4], .panel = p[2], .c = p[0], .m = i[1], .ldc = i[2], .cols = i[3], .k = i[4]};
    o.row_bytes = sv_trial_rows_%(f)s(p[4], p[1], (int)i[1], (int)i[4], (int)i[5]);
    o.group = i[5], o.bias = i[6] ? p[3] : NULL, o.steady = i[1] <= SV_STEADY_ROWS;
    const sv_panel_kernel kernel = (sv_panel_kernel)(uintptr_t)i[0];
    if (kernel) kernel(&o);
    else sv_%(f)s_panel(&o);
"""
DATA, ELEMENTS, START = 11, 9, 8
"""Sections of a module."""


@cache
def library(form: Format, isa):
    """A module with the kernel of a format, and the place of its first candidate in the table of functions."""
    source = [*format_headers({form.name}, isa), *choices({form.name}, isa), export("trial", BODY % {"f": form.name})]
    lib = load("\n".join(source), isa)
    beside = wasmtime.Instance(lib.store, wasmtime.Module(lib.engine, candidates(form, isa)), [lib.memory]).exports(
        lib.store
    )
    beside["__stack_pointer"].set_value(lib.store, wasmtime.Val.i32(STACK))
    table, count = lib.exports["__indirect_function_table"], len(every(form, isa))
    first = table.grow(lib.store, count, None)
    for number in range(count):
        table.set(lib.store, first + number, beside[f"c{number}"])
    return lib, first


@cache
def candidates(form: Format, isa) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return build_shared(module(form, isa), Path(folder, "beside.wasm"), isa, beside=True).read_bytes()


def sections(code: bytes) -> set[int]:
    found, at = set(), 8
    while at < len(code):
        found.add(code[at])
        size, shift, at = 0, 0, at + 1
        while True:
            size, shift, at = size | (code[at] & 127) << shift, shift + 7, at + 1
            if code[at - 1] < 128:
                break
        at += size
    return found


@pytest.mark.parametrize("isa", [SIMD128, RELAXED], ids=lambda isa: isa.name)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_candidate_gives_the_results_of_the_default(form, isa):
    """Every kind of rest: rows of a block, columns of a panel, steps over k; whole numbers to the bit."""
    lib, first = library(form, isa)
    rng = np.random.default_rng(form.group)
    sizes = [(1, 32, 3), (1, 7, 64), (2, 32, 40), (5, 19, 33), (13, 32, 130), (65, 32, 450), (71, 32, 7)]
    for m, cols, k in sizes:
        k = -(-k // form.group) * form.group if form.group else k
        x, bias = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal(32).astype(np.float32)
        panel, records = packed(rng, form, 32, k), np.zeros(m * record_bytes(form, k) + 64, np.uint8)

        def result(kernel, m=m, cols=cols, k=k, operands=(x, panel, bias, records)):
            y = np.full((m, cols + 1), 7, np.float32)
            with team(lib, 1) as made:
                y_view = [y, *operands]
                assert run(lib, made, "trial", [kernel, m, cols + 1, cols, k, form.group, m % 2], y_view) == 0
            return y

        expected = result(0)
        assert (expected[:, cols] == 7).all()
        for number, candidate in enumerate(every(form, isa)):
            if form.name == "f32":
                np.testing.assert_allclose(result(first + number), expected, atol=1e-4, err_msg=str(candidate))
            else:
                np.testing.assert_array_equal(result(first + number), expected, err_msg=str(candidate))


@pytest.mark.parametrize("isa", [SIMD128, RELAXED, *THREADED], ids=lambda isa: isa.name)
def test_there_are_few_candidates_and_the_default_is_none_of_them(isa):
    for form in FORMS:
        for rows in CLASSES:
            found = space(form, isa, rows).candidates
            assert 2 <= len(found) <= MOST
            assert all((c.parameters["rows"] == 1) == (rows == 1) for c in found[1:])


@pytest.mark.parametrize("isa", [SIMD128, *THREADED], ids=lambda isa: isa.name)
def test_a_module_of_candidates_has_nothing_but_code(isa):
    """It would overwrite what the module beside it keeps there."""
    code = candidates(Format("q8", 32), isa)
    found = wasmtime.Module(engine(), code)

    assert sections(code).isdisjoint((DATA, ELEMENTS, START))
    assert [(wanted.name, wanted.type.is_shared) for wanted in found.imports] == [("memory", isa in THREADED)]


def test_kernels_can_be_chosen_on_the_web_only():
    assert choices(FORMATS, AVX2) == []
    assert choices({"bf16", "rows"}, SIMD128) == []


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.more = torch.nn.Linear(24, 70), torch.nn.Linear(70, 24), torch.nn.Linear(24, 33)

    def forward(self, x):
        return self.more(self.down(torch.relu(self.up(x))))


def test_problems_are_products_of_one_depth_with_all_their_weights():
    batch = torch.export.Dim("batch", max=300)
    uses = compile_program(sv.trace(Layers(), {"x": torch.zeros(3, 24)}, dynamic={"x": {0: batch}})).panels
    fixed = compile_program(sv.trace(Layers(), {"x": torch.zeros(9, 24)}, dynamic={"x": None})).panels

    assert {(p.depth, p.rows) for p in uses} == {(k, rows) for k in (24, 70) for rows in CLASSES[1:]}
    assert uses[PanelProblem(Format("f32"), 24, 4)].panels == {"up.weight@f32": 3, "more.weight@f32": 2}
    assert [(p.depth, p.rows) for p in ranked(fixed)] == [(24, 32), (70, 32)]
