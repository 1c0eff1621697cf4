"""Few rows at once have, bit for bit, what each has alone: linear layers of every format, attention over caches."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.codegen.attention import STEADY_QUERIES, part_floats
from sylvester.codegen.bfloat16 import bf16_bits, pack_bf16
from sylvester.codegen.formats import format_headers
from sylvester.codegen.layout import Format
from sylvester.codegen.linear import linear_text, record_bytes
from sylvester.codegen.panels import pack_f32, pack_q3, pack_q4, pack_q8
from sylvester.codegen.prelude import STEADY_ROWS
from tests.kernel_harness import export, load, run, supported, team
from tests.test_kernels_attention import make_operands, name_of, pack_args
from tests.test_kernels_attention import source as attention_source

FORMS = (Format("f32"), Format("bf16"), Format("q8"), Format("q8", 64), Format("q4", 32), Format("q3", 64, 16))
SHAPES = ((33, 64), (96, 640), (40, 1024))
ROWS = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 31, STEADY_ROWS)


def source(form, isa):
    body = "layer(t, p[0], NULL, p[1], p[2], p[3], p[4], i[0], i[1], i[2], i[2], NULL, NULL);"
    parts = [*format_headers({form.name}, isa), linear_text(form).replace("NAME", "layer")]
    return "".join([*parts, export("layer", body, "layer_scratch(i[2])")])


def packed(rng, form, n, k):
    """A weight of random numbers as the kernel reads it."""
    if form.name == "f32":
        return pack_f32(rng.standard_normal((n, k), np.float32))
    if form.name == "bf16":
        return pack_bf16(bf16_bits(rng.standard_normal((n, k), np.float32)))
    scales = rng.random((n, k // form.group if form.group else 1), np.float32) + np.float32(0.5)
    if form.name == "q8":
        return pack_q8(rng.integers(-127, 128, (n, k), np.int8), scales)
    pack, columns = (pack_q4, k // 2) if form.name == "q4" else (pack_q3, k // 8 * 3)
    return pack(rng.integers(0, 256, (n, columns), np.uint8), scales)


def variants(form):
    """The variant of every CPU, and the best one for the format here."""
    found = supported(form.name)
    return tuple(dict.fromkeys((found[0], found[-1])))


@pytest.mark.parametrize(
    ("form", "isa"), [(f, isa) for f in FORMS for isa in variants(f)], ids=lambda x: getattr(x, "name", None)
)
def test_a_row_of_a_linear_layer_is_the_same_in_any_company(form, isa):
    lib = load(source(form, isa), isa)
    for threads in (1, 3):
        check_rows(lib, form, threads)


def check_rows(lib, form, threads):
    rng = np.random.default_rng(0)
    with team(lib, threads) as made:
        for n, k in SHAPES:
            x, bias = rng.standard_normal((STEADY_ROWS, k), np.float32), rng.standard_normal(n, np.float32)
            weight, records = packed(rng, form, n, k), np.zeros(STEADY_ROWS * record_bytes(form, k) + 64, np.uint8)

            def product(rows, n=n, k=k, weight=weight, bias=bias, records=records):
                y = np.full((len(rows), n), np.nan, np.float32)
                arrays = [y, np.ascontiguousarray(rows), weight, bias, records]
                assert run(lib, made, "layer", [len(rows), n, k], arrays) == 0
                return y

            alone = np.concatenate([product(x[i : i + 1]) for i in range(STEADY_ROWS)])
            assert np.isfinite(alone).all()
            for m in ROWS:
                assert np.array_equal(product(x[-m:]), alone[-m:]), (m, n, k)


# batch, heads, key heads, cache rows, position of the first query, window
PLACES = [(1, 6, 2, 64, 3, 0), (2, 4, 4, 300, 250, 0), (1, 8, 1, 900, 500, 0), (1, 12, 1, 700, 505, 0)]
PLACES += [(1, 20, 1, 80, 30, 0), (1, 4, 2, 1100, 1050, 300), (1, 2, 2, 2100, 2040, 0)]


INSTANCES = ((64, 64, "none", "f32"), (7, 5, "none", "f32"), (40, 33, "none", "bf16"))


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_a_query_is_the_same_in_any_company(isa, threads):
    for instance in INSTANCES:
        check_queries(load(attention_source(INSTANCES), isa), instance, threads)


def check_queries(lib, instance, threads):
    d, dv, _, cache = instance
    rng = np.random.default_rng(0)
    part = np.zeros(part_floats(dv), np.float32)
    with team(lib, threads) as made:
        for batch, heads, kv_heads, most, past, window in PLACES:

            def attend(y, q, stored, offset, rows, sizes=(batch, heads, kv_heads, most), window=window):
                case = (*sizes[:3], rows, sizes[3], offset + rows, 1, offset, window)
                args = pack_args(y, q, *stored, None, case, part)
                args.steady = 1
                assert run(lib, made, name_of(*instance), [], [np.frombuffer(args, np.uint8)]) == 0

            rows = STEADY_QUERIES
            case = (batch, heads, kv_heads, rows, most, past + rows, 1, past, window)
            alone, q, stored, _ = make_operands(rng, d, dv, cache, case)
            for i in range(rows):
                attend(alone[:, :, i : i + 1], q[:, :, i : i + 1], stored, past + i, 1)
            assert np.isfinite(alone).all()
            for first, count in ((0, rows), (0, 2), (3, 3), (1, 8), (5, 11), (15, 1)):
                y = np.full_like(alone[:, :, first : first + count], np.nan)
                attend(y, q[:, :, first : first + count], stored, past + first, count)
                assert np.array_equal(y, alone[:, :, first : first + count]), (case, first, count)
