"""The int8 kernels of training against the same in float, on every instruction set that this CPU has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sylvester.backends import halo
from sylvester.backends.cuda import training
from sylvester.backends.cuda.modules import interpret
from sylvester.backends.cuda.training import Products
from sylvester.codegen.halo import text
from sylvester.codegen.isa import Isa
from sylvester.compiler import halo_kernels, halo_ops, registry
from sylvester.compiler.errors import CompileError, ToolchainMissing, Unsupported
from sylvester.compiler.hadamard import find
from sylvester.compiler.halo_grouped import GROUP, composite_grouped, composite_restored
from sylvester.compiler.halo_kernels import arithmetic
from sylvester.compiler.halo_ops import Rounded, composite_product, composite_rounded, halo_linear
from sylvester.compiler.halo_rotate import padded, rotate
from tests.kernel_harness import load, supported

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)
SIZES = ((1, 8), (7, 12), (33, 96), (70, 257), (17, 36), (50, 400), (5, 97), (130, 64))


def builds() -> list[tuple[Isa, str, str]]:
    """(instruction set, variant, text), with AMX tiles also emulated where there are dot products of bytes."""
    found = supported("q8", "bf16")
    dots = [isa for isa in found if isa.name in halo.UNITS][:1]
    return [*((isa, isa.name, "") for isa in found), *((isa, "amx", "#define SV_AMX_EMULATE 1\n") for isa in dots)]


@pytest.fixture(params=builds(), ids=lambda build: f"{build[1]}{'-emulated' * bool(build[2])}")
def kernels(request: pytest.FixtureRequest) -> halo.Kernels:
    isa, variant, before = request.param
    return halo.Kernels(load(before + text(), isa), variant)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halo_kernels, "library", lambda: CompileError("no kernels in this test"))


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def wide(x: Tensor, tokens: bool, features: bool) -> tuple[Tensor, Tensor]:
    """What is rounded, in float64, and the largest of it."""
    exact = composite_rounded(x.double(), None, "exact", features, tokens, "").values
    return exact, exact.abs().max()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_rounding(kernels, features, tokens):
    for rows, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, width, dtype=dtype)
            for format, top in (("int8", 127), ("int4", 7)):
                found = Rounded(*kernels.rounded(x, None, format, features, tokens))
                exact, largest = wide(x, tokens, features)
                assert found.values.shape == (padded(rows) if tokens else rows, width)
                torch.testing.assert_close(found.scale.double(), largest / top, rtol=1e-5, atol=0)
                assert ((found.values * found.scale.double() - exact) / found.scale).abs().max() < 0.501


def test_rounding_with_a_given_scale(kernels):
    x, scale = torch.randn(9, 24), torch.tensor(0.01)
    for features in (False, True):
        values, kept = kernels.rounded(x, scale, "int8", features, False)
        expected = (wide(x, False, features)[0] / 0.01).clamp(-127, 127)
        assert kept == scale
        assert (values - expected).abs().max() < 0.501
    assert not kernels.rounded(torch.zeros(3, 8), None, "int8", True, True)[0].any()


def test_groups_of_rows(kernels):
    for rows, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(rows, width) * torch.logspace(-25, 30, rows)[:, None]).to(dtype)
            if rows > 2:
                x[0, 0], x[-1, -1] = torch.nan, torch.inf
            found, expected = Rounded(*kernels.grouped(x)), composite_grouped(x)
            assert torch.equal(found.values, expected.values)
            torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0, equal_nan=True)
            back = kernels.restored(*found, dtype)
            torch.testing.assert_close(back, composite_restored(expected, dtype), rtol=0, atol=0, equal_nan=True)
            assert back.isnan().sum() <= 2 * GROUP
            off = (back.double() - x.double()).abs() / x.double().abs().amax(1, keepdim=True)
            assert off.nan_to_num().max() < 0.009
    view = torch.randn(9, 200)[:, 7:177]
    assert torch.equal(kernels.grouped(view)[0], kernels.grouped(view.contiguous())[0])


def test_what_layers_keep_is_turned_back(kernels):
    for rows, width in SIZES:
        x = torch.randn(rows, width)
        for features in (False, True):
            kept = Rounded(*kernels.rounded(x, None, "int8", features, False))
            found = kernels.restored(*kept, torch.float32, features).double()
            expected = rotate(kept.wide().double(), transposed=True) if features else kept.wide().double()
            assert (found - expected).abs().max() < 1e-5


def test_rows_of_any_stride(kernels):
    x = torch.randn(20, 30)
    for view in (x[:, 3:15], x.t(), x[::2]):
        found, expected = (kernels.rounded(v, None, "int8", True, False) for v in (view, view.contiguous()))
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(kernels, simulated, dtype):
    if not kernels.multiplies:
        assert kernels.product(integers(4, 4), integers(4, 4), ONE) is None
        return
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    for m, k, n in ((1, 4, 5), (7, 12, 33), (48, 96, 96), (130, 97, 64), (100, 70, 257), (5, 3, 2)):
        a, b, scales = integers(m, k), integers(k, n), (torch.tensor(0.01), torch.tensor(0.02))
        for turned in range(4):
            x = a.t().contiguous().t() if turned & 1 else a
            w = b.t().contiguous().t() if turned & 2 else b
            for features, tokens in ((False, 0), (True, 0), (True, m - m // 7), (False, m)):
                if tokens and find(m) is None:
                    continue
                bias = None if tokens else torch.randn(n)
                found = kernels.product(x, w, scales[0] * scales[1], bias, features, tokens, dtype)
                operands = Rounded(x, scales[0]), Rounded(w, scales[1])
                expected = composite_product(*operands, bias, features, tokens, torch.float32)
                assert (found.dtype, found.shape) == (dtype, expected.shape)
                assert (found.float() - expected).norm() <= bound * expected.norm()


def test_the_deepest_sums(kernels):
    if kernels.multiplies:
        a, b = (torch.full(s, 127, dtype=torch.int8) for s in ((2, 1 << 16), (1 << 16, 3)))
        assert torch.equal(kernels.product(a, -b, ONE), torch.full((2, 3), -float(127 * 127 << 16)))
        assert kernels.product(torch.cat((a, a), 1), torch.cat((b, b)), ONE) is None


def test_operands_that_kernels_do_not_take(kernels):
    assert kernels.rounded(torch.randn(3, 8).double(), None, "int8", True, False) is None
    assert kernels.rounded(torch.randn(3, 8), None, "fp8", True, False) is None
    assert kernels.rounded(torch.randn(0, 8), None, "int8", True, False) is None
    assert kernels.product(torch.randn(3, 4), torch.randn(4, 3), ONE) is None
    assert kernels.product(integers(0, 4), integers(4, 3), ONE) is None


def layer(level):
    x, weight, bias = torch.randn(40, 96), torch.randn(64, 96), torch.randn(64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = halo_linear(*leaves, level, "int8")
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("level", range(4))
def test_layers_train_as_in_the_simulation(monkeypatch, level):
    torch.manual_seed(0)
    found = layer(level)
    monkeypatch.setattr(halo_kernels, "library", lambda: CompileError("no kernels in this test"))
    torch.manual_seed(0)
    for f, e in zip(found, layer(level), strict=True):
        assert (f - e).norm() <= 2e-3 * e.norm()


def test_what_multiplies_is_said(monkeypatch):
    assert "simulated in float32: CPUs do not multiply fp8" in arithmetic("fp8", CPU)
    assert arithmetic("int8", torch.device("meta")) == "simulated in float32: there are no kernels for meta"
    monkeypatch.setattr(halo_kernels, "has_tiles", lambda: False)
    old, new, tiles = (SimpleNamespace(multiplies=n != "avx2", variant=n) for n in ("avx2", "vnni", "amx"))
    for found, said in (
        (ToolchainMissing("no C compiler"), "simulated in float32: no C compiler"),
        (old, "simulated in float32: this CPU (avx2) has no dot products of bytes"),
        (new, "int8 dot products of this CPU (vnni)"),
        (tiles, "int8 tiles of this CPU (amx)"),
    ):
        monkeypatch.setattr(registry, "resolve", lambda place, f=found: lambda: f)
        assert arithmetic("int8", CPU) == said
    monkeypatch.setattr(halo_kernels, "has_tiles", lambda: True)
    monkeypatch.setattr(registry, "resolve", lambda place: lambda: ToolchainMissing("no C compiler"))
    assert arithmetic("int8", CPU) == "int8 tiles (AMX) of PyTorch, rotations by its ops"


def test_tiles_of_pytorch(simulated, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(halo_ops, "has_tiles", lambda: False)
    expected = layer(2)
    monkeypatch.setattr(halo_ops, "has_tiles", lambda: True)
    torch.manual_seed(0)
    for f, e in zip(layer(2), expected, strict=True):
        assert (f - e).norm() <= 2e-3 * e.norm()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_products_of_gpus(dtype):
    """By Triton's interpreter."""
    gpu, scale = Products("sm_89", interpret), torch.tensor(0.02)
    for m, k, n in ((5, 70, 33), (40, 64, 17)):
        a, b = ((torch.randint(-100, 101, s).float() / 4).to(dtype) for s in ((k, m), (k, n)))
        found = gpu.product(a.t(), b, scale)
        expected = a.double().t() @ b.double() * 0.02
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert gpu.product(torch.randn(3, 4), torch.randn(4, 3), scale) is None
    assert (
        Products("sm_80", interpret).product(*(torch.ones(4, 4).to(torch.float8_e4m3fn) for _ in "ab"), scale) is None
    )


def test_what_multiplies_on_gpus(monkeypatch):
    gpus = {1: Products("sm_80", interpret), 2: Unsupported("a GPU of capability 7.5, kernels are for 8.0 and later")}
    monkeypatch.setattr(registry, "resolve", lambda place: gpus.__getitem__)
    first, second = (torch.device("cuda", n) for n in (1, 2))
    assert arithmetic("int4", first) == "int8 products of Triton (sm_80)"
    assert arithmetic("fp8", first) == "simulated in float32: GPUs of sm_80 do not multiply fp8"
    assert arithmetic("int8", second) == "simulated in float32: a GPU of capability 7.5, kernels are for 8.0 and later"
    assert [training._architecture(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1))] == [
        *("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    ]
    with pytest.raises(Unsupported, match=r"a GPU of capability 7\.5"):
        training._architecture((7, 5))


def test_the_region_of_pytorch_is_found():
    assert "libgomp" not in torch.__config__.parallel_info() or isinstance(halo.parallel_region(), int)
