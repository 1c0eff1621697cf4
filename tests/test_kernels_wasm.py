"""Kernels as WebAssembly, run by wasmtime: the kernel tests again, with SIMD128 and relaxed SIMD."""

from __future__ import annotations

import pytest
import wasmtime

from sylvester.backends.toolchain import build_shared
from sylvester.codegen.isa import RELAXED, SIMD128, THREADED
from sylvester.codegen.prelude import prelude
from tests import (
    test_kernels_bf16,
    test_kernels_conv2d,
    test_kernels_gemm,
    test_kernels_hadamard,
    test_kernels_math,
    test_kernels_quantized,
    test_kernels_records,
    test_kernels_steady,
    test_kernels_tree,
)
from tests.webassembly import engine

KERNELS = {
    "linear": lambda isa: test_kernels_gemm.test_linear(isa, 1),
    "matmul": lambda isa: test_kernels_gemm.test_matmul_takes_any_strides(isa, 1),
    "empty": test_kernels_gemm.test_empty_sizes,
    "exp": lambda isa: test_kernels_math.test_close_to_float64(isa, "exp"),
    "bf16": lambda isa: test_kernels_bf16.test_panels(isa, ""),
    "records": lambda isa: test_kernels_records.check_cases(
        isa, 1, [(40, "none", 8), (150, "none", 4)], test_kernels_records.USED[:5]
    ),
    "record rows": lambda isa: test_kernels_records.test_rows_are_written_as_the_op_does(isa, 4),
    "conv2d": lambda isa: test_kernels_conv2d.test_conv2d(isa, 1, 0),
    "hadamard": lambda isa: test_kernels_hadamard.test_every_kind_of_base(isa, "lanes"),
    "hadamard fourier": lambda isa: test_kernels_hadamard.test_every_kind_of_base(isa, "fourier"),
    "low-bit": test_kernels_quantized.test_under_emulation,
    "steady": lambda isa: [
        test_kernels_steady.test_a_row_of_a_linear_layer_is_the_same_in_any_company(form, isa)
        for form in test_kernels_steady.FORMS
    ],
    "tree": lambda isa: test_kernels_tree.test_a_query_is_the_same_in_a_tree_and_at_the_end_of_a_chain(isa, 1),
}
"""The bodies of the kernel tests, which take any variant."""
ALIKE = ("conv2d", "hadamard fourier", "tree", "record rows", "empty")
"""Those with nothing of relaxed SIMD but products that are added."""


@pytest.mark.parametrize(
    ("kernel", "isa"),
    [(name, isa) for name in KERNELS for isa in ((RELAXED,) if name in ALIKE else (SIMD128, RELAXED))],
    ids=lambda x: getattr(x, "name", None),
)
def test_kernel(kernel, isa):
    KERNELS[kernel](isa)


@pytest.mark.parametrize("isa", THREADED, ids=lambda isa: isa.name)
def test_threaded_modules_share_their_memory(isa, tmp_path):
    module = wasmtime.Module.from_file(engine(), str(build_shared(prelude(isa), tmp_path / "module.wasm", isa)))
    memory = next(wanted for wanted in module.imports if wanted.name == "memory")
    assert memory.type.is_shared
    assert {"sv_team_work", "sv_team_stop", "sv_team_place"} <= {found.name for found in module.exports}
