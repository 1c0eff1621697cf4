"""Activations that are kept in 8 bits for the backward pass: bytes, errors of gradients, what stays as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import sylvester as sv
from benchmarks.halo_kept import kept
from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_grouped import composite_grouped, composite_restored
from sylvester.compiler.halo_layout import laid_out
from sylvester.compiler.halo_module import HaloModule
from sylvester.compiler.halo_saving import Gated

WIDTH, TOKENS, VOCABULARY = 64, 48, 40


class Block(nn.Module):
    """Attention, and a gated or a plain FFN."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")
        self.gate = nn.Linear(WIDTH, 128) if gate else None
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).view(*x.shape[:2], 4, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        y = F.silu(self.gate(y)) * self.up(y) if self.gate else F.gelu(self.up(y))
        return x + self.down(y)


class Model(nn.Module):
    """A language model of two blocks."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(gate) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.randint(VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(0))


@functools.cache
def traced(gate: bool) -> HaloModule:
    torch.manual_seed(0)
    return sv.halo(Model(gate), (IDS[:2],), saved="int8")


def made(saved: str = "int8", gate: bool = False) -> HaloModule:
    """The same weights for all ways to keep; tracing takes long."""
    return keeping(copy.deepcopy(traced(gate)), saved)


def keeping(module: HaloModule, saved: str) -> HaloModule:
    module._report = replace(module._report, saved=saved)
    module._running.clear()
    return module


def loss(module: Callable[[Tensor], Tensor], ids: Tensor = IDS) -> Tensor:
    return F.cross_entropy(module(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(value, [*module.parameters()]), strict=True))


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the whole gradient."""
    total = sum((found[name] - g).float().square().sum() for name, g in expected.items())
    return float((total / sum(g.float().square().sum() for g in expected.values())).sqrt())


@pytest.fixture
def exact() -> dict[str, Tensor]:
    module = made("exact")
    return gradients(module, loss(module))


@pytest.mark.parametrize("gate", [False, True])
def test_gradients_change_slightly_and_results_not_at_all(gate):
    one, other = made("exact", gate), made("int8", gate)
    assert torch.equal(one(IDS), other(IDS))
    assert 0 < error(gradients(other, loss(other)), gradients(one, loss(one))) < 0.02


@pytest.mark.parametrize("gate", [False, True])
def test_half_of_bfloat16_is_kept(gate):
    torch.manual_seed(0)
    model, module = Model(gate).bfloat16(), made(gate=gate).bfloat16()
    base = kept(model, lambda: model(IDS).sum())
    assert kept(module, lambda: module(IDS).sum()) <= 0.55 * base
    module = made("exact", gate).bfloat16()
    assert kept(module, lambda: module(IDS).sum()) > 0.8 * base


def test_nothing_else_stays_alive():
    """Allocated bytes are those that autograd is given: what is kept, results, and rounded weights."""
    module = made().bfloat16()
    loss(module).backward()
    saved = kept(module, lambda: module(IDS).sum())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = module(IDS)
    weights = sum(module.get_parameter(key).numel() for key in module.report.rewritten)
    allocated = sum(event.self_cpu_memory_usage for event in found.events())
    assert allocated == pytest.approx(saved + weights + result.nbytes, rel=0.02)


def test_what_is_off_is_as_before():
    plain, module = made("exact"), made()
    assert "saved in" not in str(plain.report)
    assert "in int8 for the backward pass by 5 layer_norm, 2 attention, 2 gelu, 1 linear;" in str(module.report)
    assert plain.running(torch.device("cpu")) == plain.graphs(torch.device("cpu"))
    seen = []
    module.eval()
    with saved_tensors_hooks(lambda x: seen.append(x.dtype) or x, lambda x: x):
        value = loss(module)
    assert torch.equal(value, loss(plain.eval()))
    assert error(gradients(module, value), gradients(plain, loss(plain))) == 0
    with torch.no_grad():
        assert module.train()(IDS).grad_fn is None


def test_passes_in_any_order(exact):
    module = made()
    first, second = loss(module), loss(module, IDS[:, :31])
    later = torch.autograd.grad(second, [*module.parameters()])
    once = torch.autograd.grad(first, [*module.parameters()], retain_graph=True)
    again = torch.autograd.grad(first, [*module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert error(dict(zip(exact, once, strict=True)), exact) < 0.02
    alone = gradients(module, loss(module, IDS[:, :31]))
    assert all(torch.equal(a, b) for a, b in zip(later, alone.values(), strict=True))


def test_hooks_around_the_module_get_what_is_kept():
    module = made()
    expected = gradients(module, loss(module))
    found = gradients(module, loss(lambda ids: checkpoint(module, ids, use_reentrant=False)))
    assert all(torch.equal(found[name], g) for name, g in expected.items())
    with save_on_cpu():
        value = loss(module)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(module, value).items())


def test_autocast_rounds_no_weights():
    one, other = made("exact"), made("int8")
    found = []
    for module in (one, other):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(module)
        found.append(gradients(module, value))
    assert 0 < error(found[1], found[0]) < 0.02
    assert torch.equal(found[1]["norm.bias"], found[0]["norm.bias"])


def test_dropout_and_relu_are_kept_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, 64), nn.Dropout(0.5))
    x, found = torch.randn(50, 64), []
    for saved in ("exact", "int8"):
        module = sv.halo(model, (x,), head=True, saved=saved)
        torch.manual_seed(1)
        found.append(gradients(module, module(x).square().sum()))
    assert module.report.saving == {"relu": 1, "dropout": 2}
    assert all(torch.equal(g, found[0][name]) for name, g in found[1].items())


def test_gradients_of_gradients_are_refused():
    module = made()
    weight = module.get_parameter("blocks.0.q.weight")
    first = torch.autograd.grad(loss(module), weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_writing_to_a_weight_before_the_backward_pass_is_an_error():
    module = made()
    value = loss(module)
    with torch.no_grad():
        module.get_parameter("norm.weight").mul_(2)
    with pytest.raises(CompileError, match=r"a tensor \[64\] that the backward pass reads was written to"):
        value.backward()


def test_adapters_train_on_it_too():
    torch.manual_seed(0)
    module, found = sv.lora(Model(), (IDS[:2],), 4, saved="int8"), []
    for name, tensor in module.adapters().items():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for saved in ("exact", "int8"):
        grads = torch.autograd.grad(loss(keeping(module, saved)), [*trained.values()])
        found.append(dict(zip(trained, grads, strict=True)))
    assert 0 < error(found[1], found[0]) < 0.02


def test_refusals():
    with pytest.raises(ValueError, match=r"saved is 'int4', expected one of \('exact', 'int8'\)"):
        sv.halo(Model(), (IDS,), saved="int4")
    with pytest.raises(CompileError, match="a joint graph keeps what its own partition says"):
        sv.halo(Model(), (IDS,), joint=True, saved="int8")
    with pytest.raises(ValueError, match="saved is 8"):
        sv.lora(Model(), (IDS,), saved=8)


VIEWS = {
    "whole": lambda: torch.randn(3, 5, 70),
    "one axis": lambda: torch.randn(2000),
    "heads": lambda: torch.randn(2, 7, 3, 4, 24)[:, :, 1].transpose(1, 2),
    "a transpose": lambda: torch.randn(40, 50).t(),
    "every other row": lambda: torch.randn(40, 70)[::2],
    "columns": lambda: torch.randn(40, 70)[:, 3:60],
    "channels last": lambda: torch.randn(2, 5, 7, 6).to(memory_format=torch.channels_last),
    "repeated": lambda: torch.randn(3, 1, 33).expand(3, 4, 33),
    "every other value": lambda: torch.randn(30, 60)[:, ::2],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_layout_come_back(name, dtype):
    x = VIEWS[name]().to(dtype)
    rows, layout = laid_out(x)
    kept_ = composite_grouped(rows)
    found = layout.fill(composite_restored(kept_, dtype))
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    dense = torch.empty_like(x).stride() if 0 not in x.stride() else found.stride()
    assert found.stride() == dense
    steps = kept_.scale.double().max()
    assert ((found - x).abs().double() <= 0.51 * steps + 0.005 * x.abs().double()).all()


def test_a_nan_or_an_infinity_stays_one():
    x = torch.randn(2, 130)
    x[0, 70], x[1, 5] = torch.nan, torch.inf
    found = composite_restored(composite_grouped(x), torch.float32)
    assert found[0, 64:128].isnan().all()
    assert found[1, :64].isnan().all()
    assert found.isfinite().sum() == x.numel() - 128


def test_gates_have_exact_gradients():
    x, y = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in "xy")
    for op, options in ((torch.ops.aten.silu.default, {}), (torch.ops.aten.gelu.default, {"approximate": "tanh"})):
        assert torch.autograd.gradcheck(lambda *a, op=op, options=options: Gated.apply(*a, op, options), (x, y))
