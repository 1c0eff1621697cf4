"""Tiles of products on GPUs: all of them fit, few rows are cut along the depth, defaults come first and are built."""

from __future__ import annotations

import pytest

from sylvester.codegen.gpu_architectures import SHARED, has_float8
from sylvester.codegen.gpu_matmul import SIZES, Linear, Norm, aligned_of, gemv, kernel
from sylvester.codegen.gpu_matmul_space import gemv_tiles, shared_bytes, tiles
from tests.gpu import builds

LAYERS = {
    "bfloat16": Linear("bf16", "bf16", "bf16"),
    "float32": Linear("fp32", "fp32", "fp32"),
    "int8": Linear("i8", "i8", "bf16", rounding="given", gated=True, activation="silu"),
    "int8, fused": Linear("fp32", "i8", "fp32", rounding="rows", gated=True, activation="gelu"),
    "float8": Linear("fp8e4nv", "fp8e4nv", "fp32", rounding="given", gated=True, activation="silu"),
    "float8, fused": Linear("fp32", "fp8e4nv", "fp32", rounding="rows", norm=Norm("rms", 1e-6, "fp32")),
    "int4": Linear("bf16", "i4", "bf16", group=64),
    "int3": Linear("bf16", "i3", "bf16", group=32, rounding="rows", norm=Norm("rms", 1e-6)),
}
ALIGNED = aligned_of(dict.fromkeys(SIZES, 4096))


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("m", [1, 17, 300])
@pytest.mark.parametrize("name", LAYERS)
def test_spaces_are_small_and_fit(name: str, m: int, arch: str):
    linear, n, k = LAYERS[name], 4096, 4096
    found = tiles(linear, m, n, k, arch)
    assert 5 <= len(set(found)) == len(found) <= 40
    assert all(shared_bytes(linear, tile) <= SHARED[arch] for tile in found)
    assert found[0].m <= max(16, 2 * m)


@pytest.mark.parametrize("name", LAYERS)
def test_few_programs_share_the_depth(name: str):
    assert tiles(LAYERS[name], 8, 256, 8192)[0].splits > 1
    assert tiles(LAYERS[name], 2048, 8192, 8192)[0].splits == 1
    assert gemv_tiles(LAYERS[name], 1, 64, 8192)[0].splits > 1
    assert gemv_tiles(LAYERS[name], 1, 8192, 8192)[0].splits == 1
    assert tiles(LAYERS[name], 8, 256, 64)[0].splits == 1


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (2048, 8192), (128256, 2048), (576, 1536), (40, 72)])
def test_single_rows_ask_for_more_at_once(name: str, n: int, k: int):
    linear = LAYERS[name]
    first, several = gemv_tiles(linear, 1, n, k), gemv_tiles(linear, 4, n, k)
    assert several[0].k <= first[0].k <= 4 * several[0].k
    assert k % several[0].k or k % (first[0].k * first[0].splits) == 0
    assert len(first) <= 60


def test_as_much_as_hides_latency_is_asked_for():
    steps = [gemv_tiles(LAYERS["bfloat16"], 1, n, 4096)[0].k for n in (2048, 4096, 65536)]
    assert steps == [1024, 512, 256]


BUILT = [(name, arch) for name in LAYERS for arch in SHARED if has_float8(arch) or "float8" not in name]


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "arch"), BUILT)
def test_defaults_have_machine_code(name: str, arch: str):
    linear = LAYERS[name]
    for m in (17, 300):
        builds(kernel(linear, tiles(linear, m, 4096, 4096, arch)[0], 4096, ALIGNED), (arch,))
    for m in (1, 4):
        builds(gemv(linear, gemv_tiles(linear, m, 4096, 4096)[0], m, 4096, ALIGNED), (arch,))
