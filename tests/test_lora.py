"""Adapters on a frozen model in 8 bits: their gradients, what is kept, files and merging, what is refused."""

from __future__ import annotations

import copy
import functools
import gc
import json
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import sylvester as sv
from sylvester.compiler import halo_ops
from sylvester.compiler import lora as front
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.halo_ops import LEVELS, rounded_weight
from sylvester.compiler.lora_ops import halo_lora
from tests.halo_rank import Model, data, loss

RANK, ALPHA = 4, 8.0


@functools.cache
def traced(format: str, targets: tuple[str, ...], dropout: float) -> tuple[Model, nn.Module]:
    torch.manual_seed(0)
    model = Model()
    example = (data()[:2, :9],)
    module = sv.lora(model, example, RANK, ALPHA, targets=targets, dropout=dropout, format=format)
    for name, tensor in module.adapters().items():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    return model, module


def made(format: str = "int8", targets: tuple[str, ...] = (), dropout: float = 0.0) -> tuple[Model, nn.Module]:
    """A model and its module with adapters that are no zeros, as nobody has changed them."""
    return copy.deepcopy(traced(format, targets, dropout))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def with_adapters(model: Model, module: nn.Module) -> Model:
    """The model in float with the adapters as further layers."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            a, b = (module.get_parameter(f"{name}.{part}.weight") for part in ("lora_A", "lora_B"))
            layer.register_forward_hook(
                lambda _, given, y, a=a, b=b: y + F.linear(F.linear(given[0], a), b) * ALPHA / RANK
            )
    for layer, name in ((layer, name) for layer in model.layers for name in ("across", "back")):
        prefix = next(path for path, other in model.named_modules() if other is layer)
        a, b = (module.get_parameter(f"{prefix}.{name}.{part}.weight") for part in ("lora_A", "lora_B"))
        weight = layer._parameters.pop(name).detach()
        setattr(layer, name, weight + (b @ a).t() * ALPHA / RANK)
    return model


@pytest.mark.parametrize(("format", "tolerance"), [("exact", 1e-5), ("int8", 0.1)])
def test_gradients_are_those_in_float(format: str, tolerance: float) -> None:
    model, module = made(format)
    own = trained(module)
    expected = torch.autograd.grad(loss(with_adapters(model, module), data()), list(own.values()))
    value = loss(module, data())
    for (name, _), found, wanted in zip(
        own.items(), torch.autograd.grad(value, list(own.values())), expected, strict=True
    ):
        assert (found - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_levels_are_exact_without_rounding(level: int) -> None:
    torch.manual_seed(level)
    x, weight, bias, a, b = (torch.randn(*shape) for shape in ((2, 7, 24), (10, 24), (10,), (3, 24), (10, 3)))
    leaves = [tensor.requires_grad_() for tensor in (x, a, b, bias)]
    y = halo_lora(x, *rounded_weight(weight, level, "exact"), bias, a, b, level, "exact", 0.5, "layer")
    wanted = F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * 0.5
    given = torch.randn_like(y)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for found, exact in zip(
        torch.autograd.grad(y, leaves, given), torch.autograd.grad(wanted, leaves, given), strict=True
    ):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_dropout_is_for_adapters_in_training() -> None:
    (_, module), (_, plain) = made("exact", dropout=0.5), made("exact")
    plain.load_state_dict(module.state_dict())
    assert not torch.equal(module(data()), module(data()))
    assert torch.equal(module.eval()(data()), plain(data()))
    for tensor in module.train().adapters().values():
        nn.init.zeros_(tensor)
    assert torch.equal(module(data()), module(data()))


def test_gradients_with_dropout() -> None:
    torch.manual_seed(0)
    x, other, weight, a, b = (torch.randn(*shape) for shape in ((7, 24), (7, 24), (10, 24), (3, 24), (10, 3)))
    leaves = [tensor.requires_grad_() for tensor in (x, other, a, b)]
    y = halo_lora(x, *rounded_weight(weight, 2, "exact"), None, a, b, 2, "exact", 0.5, "layer", other)
    wanted = F.linear(x, weight) + F.linear(F.linear(other, a), b) * 0.5
    given = torch.randn_like(y)
    for pair in zip(torch.autograd.grad(y, leaves, given), torch.autograd.grad(wanted, leaves, given), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_inputs_are_kept_in_8_bits() -> None:
    x, weight = torch.randn(32, 96, requires_grad=True), torch.randn(48, 96)
    a, b = torch.randn(4, 96, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    for adapters, bytes_of_x in (((a, b), 32 * 96), ((None, None), 0)):
        kept: Counter[torch.Size] = Counter()

        def keep(tensor: torch.Tensor, kept: Counter[torch.Size] = kept) -> torch.Tensor:
            kept[tensor.shape] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            halo_lora(x, *rounded_weight(weight, 2, "int8"), None, *adapters, 2, "int8", 1.0, "layer")
        assert (kept[x.shape], kept[weight.shape]) == (bytes_of_x, 48 * 96)


def test_a_frozen_base_is_rounded_once_and_training_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = made()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight is rounded again")

    monkeypatch.setattr(halo_ops, "rounded_weight", refuse)
    monkeypatch.setattr(front, "rounded_weight", refuse)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    own = trained(module)
    optimiser, losses = torch.optim.AdamW(module.parameters(), 1e-2), []
    for _ in range(8):
        losses.append(loss(module, data()))
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == own.keys()
    assert all("lora_" in name for name in own)


def test_a_base_takes_a_byte_a_value_and_the_model_is_let_go() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8))
    module = sv.lora(model, (torch.randn(4, 256),), 2)
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None
    assert sum(buffer.nbytes for buffer in module.buffers()) == 2 * 256 * 512 + 2 * 4
    matrices = [name for name, parameter in module.named_parameters() if parameter.ndim == 2 and "lora" not in name]
    assert matrices == ["4.weight"]


def test_the_model_is_left_alone() -> None:
    model, _ = made()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == Model().state_dict().keys()


def test_targets_are_names_and_patterns() -> None:
    layers = made(targets=("up", "*.1.down*", "last"))[1].adapted.layers
    assert layers == ("layers.0.up", "layers.1.up", "layers.1.down", "last")
    _, module = made(targets=("up",))
    assert {name.rsplit(".", 2)[0] for name in trained(module)} == {"layers.0.up", "layers.1.up"}
    assert len([name for name, _ in module.named_buffers() if "base_values" in name]) == 13


def test_adapters_are_named_and_written_as_peft_does(tmp_path) -> None:
    _, module = made(targets=("up",))
    module.save_adapters(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert set(written) == {
        f"base_model.model.layers.{n}.up.lora_{part}.weight" for n in range(2) for part in ("A", "B")
    }
    assert written["base_model.model.layers.0.up.lora_A.weight"].shape == (RANK, 24)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert config["target_modules"] == ["layers.0.up", "layers.1.up"]
    other = copy.deepcopy(module)
    for tensor in other.adapters().values():
        nn.init.zeros_(tensor)
    other.load_adapters(tmp_path)
    assert torch.equal(other(data()), module(data()))
    with pytest.raises(CompileError, match="the adapters do not fit") as caught:
        made(targets=("down",))[1].load_adapters(tmp_path)
    assert "rank 4" in caught.value.hint


@pytest.mark.parametrize(("format", "original", "tolerance"), [
    ("exact", True, 1e-5), ("exact", False, 1e-5), ("int8", True, 0.05), ("int8", False, 0.05),
])  # fmt: skip
def test_merged_weights_are_a_model(format: str, original: bool, tolerance: float) -> None:
    model, module = made(format)
    merged = module.merged(model if original else None)
    assert list(merged) == list(model.state_dict())
    other = Model()
    other.load_state_dict(merged)
    with torch.no_grad():
        found, expected = other(data()), module(data())
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert not torch.equal(merged["layers.0.back"], model.state_dict()["layers.0.back"])


def test_weights_that_others_read_stay_in_float() -> None:
    report = sv.lora(Model(), (data(),), head=True).report
    assert report.kept == {"embed.weight": "something else than linear layers reads it"}


def test_a_state_dict_is_restored() -> None:
    _, module = made()
    _, other = made()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(data()), module(data()))


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"rank": 0}, ValueError, "rank is 0, expected at least 1"),
    ({"rank": 2.5}, TypeError, "rank is a float, expected a whole number"),
    ({"alpha": 0}, ValueError, "alpha is 0, expected a number above 0"),
    ({"dropout": 1.0}, ValueError, "dropout is 1.0, expected a number from 0 to below 1"),
    ({"level": 4}, ValueError, "level is 4"),
    ({"format": "int3"}, ValueError, "format is 'int3'"),
    ({"targets": ("up", "q_proj")}, CompileError, r"no layer matches the targets \['q_proj'\]"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sv.lora(Model(), (data(),), **options)


def test_models_are_checked() -> None:
    with pytest.raises(TypeError, match=r"model is a str, expected an nn\.Module"):
        sv.lora("model", (data(),))
    with pytest.raises(TypeError, match=r"expected the nn\.Module it was made from"):
        sv.lora(sv.halo(Model(), (data(),)), (data(),))
    with pytest.raises(CompileError, match="no linear layer can have an adapter"):
        sv.lora(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), (torch.randn(2, 4),))


def test_a_simulation_is_refused_on_demand() -> None:
    module = sv.lora(Model(), (data(),), format="fp8", simulate=False)
    with pytest.raises(Unsupported, match="training in fp8 on cpu is simulated"):
        module(data())


def test_a_nan_names_its_layer() -> None:
    model = Model()
    nn.init.constant_(model.layers[1].up.weight, torch.nan)
    with pytest.raises(CompileError, match=r"the weight of the layer 'layers\.1\.up' holds a NaN"):
        sv.lora(model, (data(),))


def test_adapters_are_not_split_between_ranks() -> None:
    with pytest.raises(CompileError, match="adapters"):
        sv.halo_shard(made()[1])
