"""One of four processes that train small modules split between 1, 2 and 4 of them: `python -m tests.halo_rank`."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

import sylvester as sv
from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_gather import Gathered
from sylvester.compiler.halo_ops import HALO_LINEAR

WORLD, STEPS, RATE = 4, 3, 1e-3
FULL = StateDictOptions(full_state_dict=True)


class Layer(nn.Module):
    """Rows that four ranks do not divide, fewer rows than ranks, and matrices [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 50), nn.Linear(50, 24)
        self.few, self.many = nn.Linear(24, 3), nn.Linear(3, 24, bias=False)
        self.across, self.back = (nn.Parameter(torch.randn(*s) / 5) for s in ((24, 22), (22, 24)))

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.relu(self.up(y))) + self.many(self.few(y)) + y @ self.across @ self.back


class Model(nn.Module):
    """A language model with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(31, 24), nn.ModuleList(Layer() for _ in range(2))
        self.last, self.head = nn.Linear(24, 24), nn.Linear(24, 31, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x))


@functools.cache
def _traced() -> nn.Module:
    torch.manual_seed(0)
    return sv.halo(Model(), (data()[:2, :9],), 2, "int8")


def build(format: str = "int8", factor: float = 1.0, saved: str = "exact") -> nn.Module:
    """A module of its own parameters, so many times as large; tracing takes long, so it is for another format after."""
    module = copy.deepcopy(_traced())
    module._report = replace(module.report, format=format, saved=saved)
    module._running.clear()
    for graph in module.graphs(torch.device("cpu")).values():
        for node in graph.graph.find_nodes(op="call_function", target=HALO_LINEAR):
            node.update_arg(4, format)
        graph.recompile()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    return module


def data() -> torch.Tensor:
    return torch.randint(31, (4, 12), generator=torch.Generator().manual_seed(1))


def loss(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Counting(DefaultAllGather):
    """Counts the bytes that a rank sends."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        self.sent.append(input_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, async_op)


def gathered(module: nn.Module) -> dict[str, torch.Tensor]:
    """Values and scales of all weights that are gathered rounded."""
    parts: dict[str, Any] = {**{f"{p}.": module.get_submodule(p) for p in module.sharding.blocks}, "": module}
    found = {}
    for path, part in parts.items():
        part.unshard()
        for name, parameter in part.named_parameters():
            if isinstance(parameter, Gathered):
                found[f"{path}{name}"] = parameter.rounded.values.view(torch.int8).clone()
                found[f"{path}{name}.scale"] = parameter.rounded.scale.clone()
        part.reshard()
    return found


def trained(module: nn.Module, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Some steps on the same data on all ranks: losses, what is gathered before each step, bytes, and the weights."""
    sv.halo_shard(module, mesh)
    counting = Counting()
    module.get_submodule("layers.0").set_custom_all_gather(counting)
    optimiser, found = torch.optim.AdamW(module.parameters(), RATE), {}
    for step in range(STEPS):
        value = loss(module, data())
        value.backward()
        found |= {f"{step}:{key}": tensor for key, tensor in gathered(module).items()}
        found[f"{step}:loss"] = value.detach()
        optimiser.step()
        optimiser.zero_grad()
    found["sent"] = torch.tensor(counting.sent)
    return found | {f"full:{key}": tensor.clone() for key, tensor in get_model_state_dict(module, options=FULL).items()}


def gradients(mesh: DeviceMesh, ids: torch.Tensor, format: str, saved: str) -> dict[str, torch.Tensor]:
    """Means over ranks."""
    module = sv.halo_shard(build(format, saved=saved), mesh, reduce_dtype=None, reshard_after_forward=saved != "exact")
    loss(module, ids).backward()
    return {key: parameter.grad.full_tensor() for key, parameter in module.named_parameters()}


def restored(mesh: DeviceMesh, full: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of weights from a whole state dict, and again from that of the parts after they have changed."""
    module = sv.halo_shard(build(), mesh)
    loss(module, data()).backward()
    set_model_state_dict(module, full, options=FULL)
    losses = [evaluated(module)]
    kept = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    losses.append(evaluated(module))
    module.load_state_dict(kept)
    return torch.stack([*losses, evaluated(module)])


def evaluated(module: nn.Module) -> torch.Tensor:
    """The loss; afterwards ranks hold parts again, as after a gradient."""
    with torch.no_grad():
        value = loss(module, data())
    module.reshard()
    return value


def refused(mesh: DeviceMesh) -> torch.Tensor:
    """Whether every rank is told of a NaN that only the last one holds."""
    module = build()
    with torch.no_grad():
        module.get_parameter("layers.1.up.weight")[-1, 0] = torch.nan
    sv.halo_shard(module, mesh)
    try:
        module(data())
    except CompileError as error:
        return torch.tensor("'layers.1.up' holds" in str(error))
    return torch.tensor(False)


def main(folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=WORLD)
    meshes = {
        n: init_device_mesh("cpu", (WORLD // n, n), mesh_dim_names=("other", "ranks"))["ranks"] for n in (1, 2, 4)
    }
    for format, ranks in (("int8", 1), ("int8", 2), ("int8", 4), ("fp8", 4), ("int4", 4)):
        save_file(trained(build(format), meshes[ranks]), folder / f"{format}-{ranks}-{number}.safetensors")
    full = build(factor=0.9).state_dict()
    rest = {"restored": restored(meshes[4], full), "refused": refused(meshes[4])}
    save_file(gradients(meshes[2], data(), "int8", "int8"), folder / f"saved-{number}.safetensors")
    mean = gradients(meshes[4], data()[number : number + 1], "exact", "exact")
    save_file(mean | rest, folder / f"rest-{number}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
