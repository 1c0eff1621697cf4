"""Layers on GPUs that do not read the weights which meet zeros, by Triton's interpreter, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sylvester as sv
from sylvester.backends.cuda import bench, emulated
from sylvester.backends.cuda.emulated import Emulated
from sylvester.backends.cuda.problems import sites
from sylvester.backends.cuda.simulated import Simulated
from sylvester.codegen.gpu_linears import DENSE, SKIPS
from sylvester.codegen.gpu_matmul import Linear, Norm, Tile, finish, finish_grid, gemv_grid
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries
from sylvester.codegen.gpu_sparse import few, few_tiles, opening
from sylvester.codegen.sparse import pack_columns
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import OPS
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.sparse_ops import ACTIVATIONS
from sylvester.passes.sparsify_activations import SparsifyActivations
from tests import cuda_models
from tests.gpu import builds, run, with_columns
from tests.programs import program

TILE = Tile(1, 32, 32)
TURNED = Linear("fp32", "fp32", "fp32", turned=True)
SHAPES = [(1, 70, 5), (1, 33, 200), (2, 129, 100), (3, 31, 290), (4, 64, 64)]


def thinned(m: int, k: int, kept: float) -> Tensor:
    return torch.randn(m, k) * (torch.rand(m, k) < kept)


def turned(weight: Tensor) -> Tensor:
    return torch.from_numpy(pack_columns(weight.numpy()))


def skipped(x: Tensor, weight: Tensor, tile: Tile = TILE, **more: Tensor) -> Tensor:
    """x W^T by `skipping`, with what `Linear` names besides; parts of the depth are added up."""
    (m, k), n = x.shape, len(weight)
    form = Linear("fp32", "fp32", "fp32", turned=True, **{name: "fp32" for name in more})
    packed, y = turned(weight), torch.full((m, n), math.nan)
    parts = y if tile.splits == 1 else torch.full((tile.splits, m, n), math.nan)
    sizes = {"m": m, "n": n, "k": k, "x_row": k, "w_row": packed.shape[1], "y_row": n, "residual_row": n}
    run(few(form, tile, m, k), gemv_grid(tile, n), x=x, w=packed, y=parts, **more, **sizes)
    if tile.splits > 1:
        sizes = {name: sizes[name] for name in ("m", "n", "y_row", "residual_row")}
        run(finish(form, tile.splits), finish_grid(m, n), parts=parts, y=y, **more, **sizes)
    return y


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_over_zeros_is_the_dense_layer(shape, kept):
    m, n, k = shape
    x, weight, bias, residual = thinned(m, k, kept), torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    wide = x.double() @ weight.double().T
    torch.testing.assert_close(skipped(x, weight).double(), wide, rtol=1e-5, atol=1e-5)
    found = skipped(x, weight, Tile(1, 64, 16, splits=3), bias=bias, residual=residual)
    torch.testing.assert_close(found.double(), wide + bias + residual, rtol=1e-5, atol=1e-5)


def opened_reference(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, thresholds: Tensor, name: str) -> Tensor:
    return OPS["sparse_glu"](*(t.double() for t in (x, weight, bias, gate)), thresholds.double(), name)


def opened(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, thresholds: Tensor, name: str) -> Tensor:
    """a (x W^T + bias) by `sparse_glu`."""
    (m, k), n = x.shape, len(weight)
    y, tile = torch.full((m, n), math.nan), Tile(1, 8, 32)
    given = {"x": x, "w": weight, "y": y, "bias": bias, "gate": gate, "thresholds": thresholds}
    sizes = {"m": m, "n": n, "k": k, "x_row": k, "w_row": k, "y_row": n}
    made = few(Linear("fp32", "fp32", "fp32", bias="fp32", opening=name), tile, m, k)
    run(made, (-(-n // tile.n),), **given, **sizes)
    return y


@pytest.mark.parametrize("level", [-1.0, 0.1, 99.0])
@pytest.mark.parametrize(("shape", "name"), list(zip(SHAPES, [*ACTIVATIONS, *ACTIVATIONS], strict=False)))
def test_a_gated_layer_is_the_dense_one_with_zeros(shape, name, level):
    m, n, k = shape
    x, weight, bias, gate = torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    given = x, weight, bias, gate, level * (0.5 + torch.rand(n)), name
    wide = opened_reference(*given)
    torch.testing.assert_close(opened(*given).double(), wide, rtol=1e-5, atol=2e-5)
    assert bool((wide == 0).all()) == (level > 9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_at_its_threshold_is_closed(name):
    """Activations of large numbers are these numbers: equality is exact."""
    n, k, m = 37, 19, 2
    gate = torch.randint(30, 90, (1, n)).float().expand(m, n).contiguous()
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    below = torch.nextafter(gate[0], torch.zeros(n))
    thresholds = torch.where(torch.arange(n) % 2 == 0, gate[0], below)
    y = opened(x, weight, bias, gate, thresholds, name)
    assert y.equal(torch.where(torch.arange(n) % 2 == 0, 0.0, y))
    assert (y[:, 1::2] != 0).all()
    z = torch.randn(m, n)
    expected = torch.where(gate <= thresholds, 0.0, z * gate)
    sizes = {"m": m, "n": n, "y_row": n}
    run(opening(Linear("fp32", "fp32", "fp32", opening=name)), (m, 1), y=z, gate=gate, thresholds=thresholds, **sizes)
    assert z.equal(expected)


def test_skipped_weights_are_not_read():
    """Not-a-number in weights that meet zeros does not reach the result."""
    m, n, k = 2, 70, 40
    x, weight, columns = thinned(m, k, 1.0), torch.randn(n, k), torch.rand(k) < 0.5
    x[:, columns] = 0
    weight[:, columns] = math.nan
    assert skipped(x, weight).isfinite().all()
    gate, thresholds, up = torch.randn(m, n), torch.full((n,), 0.1), torch.randn(n, k)
    closed = (F.silu(gate).abs() <= thresholds).all(0)
    up[closed] = math.nan
    y = opened(torch.randn(m, k), up, torch.randn(n), gate, thresholds, "silu")
    assert closed.any()
    assert y.isfinite().all()
    assert (y[:, closed] == 0).all()


def test_not_a_number_is_no_zero():
    x = torch.tensor([[math.nan, 0.0]])
    assert skipped(x, torch.ones(5, 2)).isnan().all()
    gate = torch.tensor([[math.nan, 1.0]])
    y = opened(torch.ones(1, 2), torch.ones(2, 2), torch.zeros(2), gate, torch.ones(2), "silu")
    assert y.isnan().tolist() == [[True, False]]


def ffn(x: Tensor, gate: Tensor, up: Tensor, thresholds: Tensor, down: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
    rows = OPS["rms_norm"](x, norm, 1e-5)
    hidden = OPS["sparse_glu"](rows, up, None, F.linear(rows, gate), thresholds, "silu")
    dense = OPS["swiglu"](F.linear(rows, gate), F.linear(rows, up))
    return x + OPS["sparse_linear"](hidden, down, None), x + F.linear(dense, down)


def ffn_weights(d: int, h: int) -> dict[str, Tensor]:
    shapes = {"gate": (h, d), "up": (h, d), "thresholds": (h,), "down": (d, h), "norm": (d,)}
    return {key: torch.rand(shape) / math.sqrt(shape[-1]) for key, shape in shapes.items()}


def simulated(made: GpuEntry, weights: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    given = with_columns(made, {**weights, "x0": x})
    return Simulated(made, given, {size.name: len(x) for size in made.sizes}).run()


def test_a_feed_forward_part_of_any_number_of_rows():
    """One stored copy of each weight, for layers that skip and for dense ones; kernels by the number of rows."""
    weights = ffn_weights(24, 70)
    made = gpu_entries(program(ffn, torch.randn(7, 24), weights=weights))["forward"]
    stored = sorted(b.key for b in made.buffers.values() if b.kind == "weight")
    assert stored == ["down@columns", "gate", "norm", "thresholds", "up"]
    assert made.notes == (SKIPS,)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 24)
        expected = ffn(x.double(), *(w.double() for w in weights.values()))
        found = simulated(made, weights, x)
        for name, wide in zip(("y0", "y1"), expected, strict=True):
            torch.testing.assert_close(found[name].double(), wide, rtol=1e-4, atol=1e-4)


def test_kernels_by_rows():
    names = {}
    for rows in (1, 7):
        made = gpu_entries(program(ffn, torch.randn(rows, 40), weights=ffn_weights(40, 100), axes=lambda _: ()))
        names[rows] = [launch.kernel.function for launch in made["forward"].launches]
    assert names[1].count("sparse_glu") == 1
    assert names[1].count("skipping") == 2
    assert "loops" not in names[1]
    assert {"matmul", "open_rows"} <= set(names[7]) <= {"matmul", "open_rows", "join", "norm", "loops"}


def test_a_weight_computed_at_run_time_is_multiplied_densely():
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return OPS["sparse_linear"](x, weight * 2, None)

    x, weight = torch.randn(2, 12), torch.randn(37, 12)
    made = gpu_entries(program(function, x, weight, axes=lambda _: ()))["forward"]
    assert made.notes == (DENSE.format("sparse_linear"),)
    found = Simulated(made, {"x0": x, "x1": weight}, {}).run()["y0"]
    torch.testing.assert_close(found, function(x, weight), rtol=1e-5, atol=1e-5)


def test_tiles_are_compared_over_memory_that_holds_the_weight(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "build", emulated.build)
    monkeypatch.setattr(bench, "CACHE", 256)
    weights = {"w": torch.randn(33, 40)}
    made = program(lambda x, w: OPS["sparse_linear"](x, w, None), torch.randn(1, 40), weights=weights)
    site = next(s for s in sites(gpu_entries(made)["forward"], {}) if s.launch.kernel.function == "skipping")
    held = {b.key: site.number(b.elements) for b in site.entry.buffers.values()}
    assert held["w@columns"] == pack_columns(weights["w"].numpy()).size
    with bench.Bench(site, emulated.Emulated(), "sm_90", tmp_path) as compared:
        assert compared.wrong() == []


def test_only_float32_weights_are_turned_or_opened():
    with pytest.raises(CompileError, match="expected float32, either turned or opened"):
        Linear("fp32", "bf16", "fp32", turned=True)


def test_kernels_are_built():
    norm = Norm("rms", 1e-5, "fp32")
    for form in (TURNED, Linear("fp32", "fp32", "fp32", turned=True, norm=norm, gated=True, residual="fp32"),
                 Linear("fp32", "fp32", "fp32", norm=norm, opening="silu")):  # fmt: skip
        builds(few(form, few_tiles(form, 3, 96, 96)[0], 3, 96), ("sm_80",))
    builds(opening(form), ("sm_80",))


@pytest.mark.nightly
@pytest.mark.parametrize("tile", few_tiles(TURNED, 1, 200, 96))
def test_tiles(tile):
    x, weight = thinned(2, 96, 0.5), torch.randn(200, 96)
    found = skipped(x, weight, Tile(1, tile.n, tile.k, tile.warps))
    np.testing.assert_allclose(found, x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_tokens_of_a_language_model_whose_activations_are_thinned(tmp_path):
    made = cuda_models.program(layers=2).clone()
    data = [{"input_ids": torch.randint(3, cuda_models.VOCAB, (2, 20))} for _ in range(4)]
    made.calibration = Calibration(tuple(data[:3]), tuple(data[3:]))
    made = Pipeline((SparsifyActivations(attention=True),), check=False)(made)
    reference = sv.compile(made, target="reference")
    with cuda_models.opened(cuda_models.saved(made, tmp_path / "a"), Emulated()) as compiled:
        for batch in (1, 2, 5):
            prompt = cuda_models.ids(batch, 3)
            assert compiled.generate(prompt, 3).tolist() == reference.generate(prompt, 3).tolist()
        names = set(compiled._runner.device.launches)
    assert {"skipping", "sparse_glu", "open_rows"} <= names
