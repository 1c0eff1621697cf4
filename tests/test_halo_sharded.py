"""Weights split between ranks: gathered rounded, the same bits on any number of ranks, half the bytes of bfloat16."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import sylvester as sv
from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_gather import Shard, packed, unpacked
from sylvester.compiler.halo_ops import rounded_weight
from tests import halo_rank
from tests.halo_rank import STEPS, WORLD, build, data, loss

ROOT = Path(__file__).parent.parent
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What four processes kept, by format and number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.halo_rank", str(folder)]
    processes = [subprocess.Popen([*command, str(n)], cwd=ROOT) for n in range(WORLD)]
    assert [process.wait(timeout=180) for process in processes] == [0] * WORLD
    names = {path.stem.rpartition("-")[0] for path in folder.glob("*.safetensors")}
    return {name: [load_file(folder / f"{name}-{n}.safetensors") for n in range(WORLD)] for name in names}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def unsplit(format: str) -> tuple[nn.Module, list[torch.Tensor]]:
    """The same steps of the whole module with gradients of 16 bits."""
    module = build(format)
    optimiser, losses = torch.optim.AdamW(module.parameters(), halo_rank.RATE), []
    for _ in range(STEPS):
        losses.append(loss(module, data()))
        losses[-1].backward()
        for parameter in module.parameters():
            parameter.grad = parameter.grad.bfloat16().float()
        optimiser.step()
        optimiser.zero_grad()
    return module, losses


def test_bits_are_the_same_on_any_number_of_ranks(found) -> None:
    expected = found["int8-1"][0]
    assert len([key for key in expected if key.startswith("0:") and key.endswith(".scale")]) == 2 * 6 + 1
    for ranks in RANKS:
        for results in found[f"int8-{ranks}"]:
            missing = {key for key in expected if key not in results}
            assert all(".across" in key for key in missing)
            assert bool(missing) == (ranks == 4)
            for key in expected.keys() - missing - {"sent"}:
                assert torch.equal(results[key], expected[key]), (ranks, key)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_ranks_compute_what_one_module_does(found, format: str) -> None:
    weights = {key: tensor.detach().clone() for key, tensor in build(format).state_dict().items()}
    trained, losses = unsplit(format)
    results = found[f"{format}-4"][3]
    for step, value in enumerate(losses):
        torch.testing.assert_close(results[f"{step}:loss"], value, rtol=1e-6, atol=0)
    for key in [key[2:-6] for key in results if key.startswith("0:") and key.endswith(".scale")]:
        weight = weights[key].t() if key.endswith(".back") else weights[key]
        values, scale = rounded_weight(weight, 2, format)
        shown = values.view(torch.int8)
        assert torch.equal(results[f"0:{key}"], shown.t() if key.endswith(".back") else shown), key
        assert torch.equal(results[f"0:{key}.scale"], scale)
    for key, tensor in trained.state_dict().items():
        torch.testing.assert_close(results[f"full:{key}"], tensor, rtol=0, atol=1e-5)


def share(name: str, shape: torch.Size, ranks: int) -> int:
    """Values that each rank sends of a parameter."""
    return shape.numel() // ranks if name == "back" else -(-shape[0] // ranks) * shape[1:].numel()


@pytest.mark.parametrize(("format", "ranks"), [("int8", 2), ("int8", 4), ("fp8", 4), ("int4", 4)])
def test_rounded_weights_take_half_the_bytes_of_bfloat16(found, format: str, ranks: int) -> None:
    expected = 0
    for name, parameter in halo_rank.Layer().named_parameters():
        plain = parameter.ndim < 2 or (name == "across" and ranks == 4)
        half = format == "int4" and name in ("down.weight", "many.weight") and parameter.shape[1] % 2 == 0
        expected += share(name, parameter.shape, ranks) * (4 if plain else 1) // (2 if half else 1)
    for results in found[f"{format}-{ranks}"]:
        sent = results["sent"].tolist()
        assert sent == [expected] * len(sent)
        assert len(sent) >= 2 * STEPS


def test_gradients_are_means_over_ranks(found) -> None:
    module = build("exact")
    loss(module, data()).backward()
    for results in found["rest"]:
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(results[key], parameter.grad, rtol=1e-4, atol=1e-6)


def test_activations_are_kept_in_8_bits(found) -> None:
    module, plain = build(saved="int8"), build()
    value = loss(module, data())
    value.backward()
    loss(plain, data()).backward()
    assert module.report.saving == {"layer_norm": 2, "relu": 2, "linear": 1}
    for results in found["saved"]:
        for key, parameter in module.named_parameters():
            assert torch.equal(results[key], parameter.grad), key
    changed = [key for key, parameter in plain.named_parameters() if not torch.equal(results[key], parameter.grad)]
    assert "layers.0.norm.weight" in changed


def test_weights_are_restored(found) -> None:
    with torch.no_grad():
        whole, parts = loss(build(factor=0.9), data()), [results["restored"] for results in found["rest"]]
    for part in parts:
        torch.testing.assert_close(part[[0, 2]], whole.expand(2), rtol=1e-6, atol=0)
        assert not torch.isclose(part[1], whole)


def test_every_rank_is_told_of_a_nan_on_one(found) -> None:
    assert all(results["refused"] for results in found["rest"])


def test_what_is_gathered_is_told(group: None) -> None:
    module = sv.halo_shard(build())
    assert module.sharding.blocks == ("layers.0", "layers.1")
    assert set(module.sharding.rounded) == set(module.report.rewritten)
    assert "13 weights are gathered rounded, in 2 blocks and the rest" in str(module.sharding)


def test_weights_that_others_read_are_gathered_as_they_are(group: None) -> None:
    torch.manual_seed(0)
    module = sv.halo_shard(sv.halo(halo_rank.Model(), (data(),), head=True))
    assert module.sharding.kept == {"embed.weight": "something else than linear layers reads it"}
    assert loss(module, data()).isfinite()


class Tied(nn.Module):
    """Two layers of a list have one weight, and two others run one through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.mixed = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.same[1].weight = self.same[0].weight
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.same[1](self.same[0](x).relu()).relu()
        first, second = self.mixed
        return self.head(first(second(first(x).relu()).relu()))


def test_modules_that_do_not_run_apart_are_gathered_with_the_rest(group: None) -> None:
    x = torch.randn(4, 8)
    module = sv.halo(Tied(), (x,))
    expected = module(x)
    assert sv.halo_shard(module).sharding.blocks == ()
    assert torch.equal(module(x), expected)


class Shared(nn.Module):
    """Every block uses a layer of the model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for first, second in self.layers:
            x = x + second(self.same(first(x).relu()).relu() * self.scale)
        return self.head(x)


def test_blocks_read_parameters_of_the_rest(group: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    whole = sv.halo(Shared(), (x,))
    module = sv.halo_shard(copy.deepcopy(whole), reduce_dtype=None)
    assert module.sharding.blocks == ("layers.0", "layers.1")
    assert len(module.sharding.rounded) == 5
    for trained in (whole, module):
        trained(x).square().sum().backward()
    for (name, found), expected in zip(module.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(found.grad.full_tensor(), expected.grad), name


def test_rows_are_rounded_again_when_they_are_written_only(group: None) -> None:
    module = sv.halo_shard(build())
    key = "layers.1.up.weight"
    weight = module.get_parameter(key)._local_tensor.weight
    loss(module, data()).backward()
    first = weight.rounded
    loss(module, data()).backward()
    assert weight.rounded is first
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert weight.rounded is None
    assert isinstance(module.get_parameter(key)._local_tensor, Shard)
    assert type(module.state_dict()[key]._local_tensor) is torch.Tensor


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gathered_weights_are_freed(group: None, format: str) -> None:
    module = sv.halo_shard(build(format))
    block = module.get_submodule("layers.0")
    block.unshard()
    values = block.get_parameter("down.weight").rounded.values
    assert values.untyped_storage().size() >= values.numel()
    value = loss(module, data())
    assert values.untyped_storage().size() == 0
    value.backward()
    assert values.untyped_storage().size() == 0


def test_values_of_4_bits_are_packed() -> None:
    values = torch.randint(-7, 8, (3, 10), dtype=torch.int8)
    assert packed(values).shape == (3, 5)
    assert torch.equal(unpacked(packed(values)).view(3, 10), values)


def test_a_module_of_sylvester_and_a_process_group_are_needed(group: None) -> None:
    with pytest.raises(TypeError, match=r"module is a Linear, expected what sylvester\.halo gives"):
        sv.halo_shard(nn.Linear(2, 2))
    module = sv.halo_shard(build())
    with pytest.raises(CompileError, match="split between ranks already"):
        sv.halo_shard(module)
    with pytest.raises(CompileError, match="assign=True"):
        module.load_state_dict(module.state_dict(), assign=True)


def test_no_process_group() -> None:
    with pytest.raises(CompileError, match="no process group"):
        sv.halo_shard(build())
