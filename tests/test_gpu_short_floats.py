"""Programs with weights in float8 and float16 on the target `cuda`: launches, artefacts, architectures, tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

import sylvester as sv
from sylvester.backends.cuda import backend, emulated
from sylvester.backends.cuda.bench import Bench
from sylvester.backends.cuda.problems import Site, sites
from sylvester.backends.tensor_file import map_tensors
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import Program
from sylvester.compiler.quantization import round_fp8, round_fp16, round_int8
from sylvester.passes.quantize import Quantize
from tests import cuda_models
from tests.gpu import builds
from tests.graphs import ADD, Builder
from tests.test_gpu_fusions import SWIGLU, check, held, kinds

dialect = torch.ops.sylvester
K, N = 104, 36


def layer(b: Builder, x: fx.Node, key: str, n: int, kind: str = "fp8", bias: bool = False) -> fx.Node:
    """A layer over rows of x with a weight of normal values, rounded."""
    k = x.meta["val"].shape[-1]
    weight = torch.randn(n, k, generator=b.random) / k**0.5
    shift = b.weight(f"{key}.bias", n) if bias else None
    if kind == "fp16":
        return b.call(dialect.linear_fp16.default, x, held(b, f"{key}.fp16", round_fp16(weight)), shift)
    stored, scales = (round_fp8 if kind == "fp8" else round_int8)(weight)
    op = dialect.linear_fp8.default if kind == "fp8" else dialect.linear_w8.default
    return b.call(op, x, held(b, f"{key}.{kind}", stored), held(b, f"{key}.scales", scales), shift)


def block(rows: int, kind: str) -> Program:
    """Two products after a norm, gated, and one that adds to the stream."""
    b = Builder()
    x = b.input(rows, K)
    n = b.rms(x, "n")
    h = b.call(SWIGLU, layer(b, n, "gate", N, kind, True), layer(b, n, "up", N, kind, True))
    return b.returns(b.call(ADD, layer(b, h, "down", K, kind), x), layer(b, n, "q", N, kind), layer(b, n, "k", N, kind))


MANY = {
    "fp8": ["quantize_rows rms", "matmul gated silu", "matmul", "matmul", "quantize_rows", "matmul added"],
    "fp16": ["norm", "matmul gated silu", "matmul", "matmul", "matmul added"],
}


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("kind", MANY)
def test_a_block_of_products(kind: str, rows: int) -> None:
    program = block(rows, kind)
    made = gpu_entries(program)["forward"]
    few = ["gemv gated silu rms", "gemv_group rms", "gemv added"]
    assert kinds(made) == (few if rows <= 4 else MANY[kind])
    check(program, made, 1e-3)


def test_few_programs_share_the_depth() -> None:
    b = Builder()
    program = b.returns(layer(b, b.input(20, 1024), "w", N))
    made = gpu_entries(program)["forward"]
    assert kinds(made) == ["quantize_rows", "matmul", "join"]
    check(program, made)


def test_rows_are_rounded_for_each_kind_of_weight() -> None:
    b = Builder()
    x = b.input(20, K)
    program = b.returns(*(layer(b, x, f"w{n}", N, kind) for n, kind in enumerate(("fp8", "int8", "fp8", "int8"))))
    made = gpu_entries(program)["forward"]
    assert kinds(made).count("quantize_rows") == 2
    check(program, made)


def test_tables_in_float8_are_widened_where_tokens_are_looked_up() -> None:
    b = Builder()
    ids = b.ids(3, high=11)
    stored, scales = round_fp8(torch.randn(11, K, generator=b.random))
    wide = b.call(dialect.dequantize_fp8.default, held(b, "t.fp8", stored), held(b, "t.scales", scales))
    program = b.returns(b.call(torch.ops.aten.embedding.default, wide, ids))
    made = gpu_entries(program)["forward"]
    assert kinds(made) == ["loops"]
    check(program, made)
    builds(made.launches[0].kernel, ("sm_89", "sm_90"))


def launched(made: GpuEntry) -> list[Site]:
    return list(sites(made, {}))


def test_products_have_problems_of_their_own_to_be_tuned() -> None:
    found = {kind: launched(gpu_entries(block(20, kind))["forward"]) for kind in ("fp8", "fp16", "int8")}
    problems = [{site.problem for site in of_kind} for of_kind in found.values()]
    assert [len(p) for p in problems] == [5, 3, 5]
    assert len(set.union(*problems)) == sum(map(len, problems))


@pytest.mark.parametrize("kind", MANY)
def test_candidates_are_timed_on_finite_values(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sylvester.backends.cuda.bench.build", emulated.build)
    monkeypatch.setattr("sylvester.backends.cuda.bench.CACHE", 256)
    site = next(s for s in launched(gpu_entries(block(20, kind))["forward"]) if s.launch.kernel.function == "matmul")
    with Bench(site, emulated.Emulated(), "sm_90", tmp_path) as bench:
        first, *others = bench.candidates
        results = bench._results(first)
        assert all(np.isfinite(y).all() and y.any() for y in results.values())
        assert bench._agrees(others[0], results)


@pytest.mark.parametrize(
    ("kind", "stored"), [("fp8", np.uint8), pytest.param("fp16", np.float16, marks=pytest.mark.nightly)]
)
def test_a_model_computes_what_it_computes_in_pytorch(kind: str, stored: type, tmp_path: Path) -> None:
    step = Quantize(kind)
    folder = cuda_models.saved(cuda_models.program(), tmp_path / "made", passes=step)
    weights = map_tensors(folder / "weights.safetensors")
    assert {array.dtype for name, array in weights.items() if name.endswith(kind)} == {np.dtype(stored)}
    prompt = cuda_models.ids(2, 7)
    with (
        sv.compile(cuda_models.program().clone(), target="reference", passes=step) as exact,
        cuda_models.opened(folder, emulated.Emulated()) as made,
    ):
        expected = np.asarray(exact(prompt)["logits"])
        np.testing.assert_allclose(made(prompt)["logits"], expected, atol=2e-3 * np.abs(expected).max())
        assert made.generate(prompt, 2).tolist() == exact.generate(prompt, 2).tolist()


def test_float8_is_built_for_architectures_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "build", emulated.build)
    program = block(20, "fp8")
    with sv.compile(program.clone(), target="cuda") as made:
        assert made.manifest.isas == ("sm_89", "sm_90")
        assert "need compute capability 8.9, that of sm_89 and later: no code for sm_80" in made.ledger
    with pytest.raises(Unsupported, match=r"need compute capability 8\.9.*found arch='sm_80'") as caught:
        sv.compile(program, target=sv.Target("cuda", arch="sm_80"))
    assert "round to int8" in caught.value.__notes__[0]
    with sv.compile(block(1, "fp16"), target=sv.Target("cuda", arch="sm_80")) as made:
        assert made.manifest.isas == ("sm_80",)


@pytest.mark.parametrize("target", ["cpu", "wasm", "onnx"])
@pytest.mark.parametrize(("kind", "dtype"), [("fp8", "float8_e4m3fn"), ("fp16", "float16")])
def test_other_targets_refuse_the_weights_by_name(kind: str, dtype: str, target: str) -> None:
    b = Builder()
    program = b.returns(layer(b, b.input(3, K), "w", N, kind))
    message = rf"the {target} target has no linear layers with weights in {dtype}: 'w\.{kind}' is torch\.{dtype}"
    with pytest.raises(Unsupported, match=message) as caught:
        sv.compile(program, target=target)
    assert "round to int8 (passes='w8a8') or bfloat16 (passes='bf16')" in caught.value.__notes__[0]
