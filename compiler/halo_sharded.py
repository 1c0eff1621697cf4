"""`sylvester.halo_shard`: training with a part of the weights on each rank, gathered in 8 bits (HALO)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_gather import Group, Shard, Weight
from sylvester.compiler.halo_graph import turned_in
from sylvester.compiler.halo_joint_module import JointModule
from sylvester.compiler.halo_module import HaloModule
from sylvester.compiler.halo_segments import Block, Place, spans, split
from sylvester.compiler.lora_module import LoraModule


@dataclass(frozen=True)
class Sharding:
    """Modules whose weights are gathered at one time, after which "" has the rest, and what is gathered rounded."""

    blocks: tuple[str, ...]
    rounded: tuple[str, ...]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.rounded)} weights are gathered rounded, in {len(self.blocks)} blocks and the rest"]
        return "\n".join([*lines, *(f"  gathered as it is: {key}: {why}" for key, why in self.kept.items())])


def halo_shard(
    module: HaloModule,
    mesh: DeviceMesh | None = None,
    *,
    reduce_dtype: torch.dtype | None = torch.bfloat16,
    reshard_after_forward: bool = True,
) -> HaloModule:
    """The module of `sylvester.halo` itself with every parameter split between the ranks of a mesh, by PyTorch's FSDP2.

    Weights of layers that train in 8 bits are gathered as their rounded values, block by block where the model has a
    list of blocks, and everything else as it is. Gradients are summed in `reduce_dtype`; None is that of the weights.
    `mesh` and `reshard_after_forward` are as for `torch.distributed.fsdp.fully_shard`; without a mesh, all ranks of the
    default process group. Make the optimiser from the parameters of the module afterwards.

    `module.sharding` says what is gathered how. `CompileError` without a process group.
    """
    _check(module)
    device = _device(module)
    mesh = mesh or init_device_mesh(device.type, (dist.get_world_size(),))
    graphs = module.graphs(device)
    places = _places(module)
    blocks = _blocks(module, graphs, places)
    rounded, kept = _layouts(module, graphs[True].graph, mesh.size(mesh.ndim - 1))
    groups = {path: Group() for path in (*blocks, "")}
    for key, turned in rounded.items():
        block = next((path for path in blocks if key.startswith(f"{path}.")), "")
        _replace(module, key, turned, groups[block])
    parts = {path: module.get_submodule(path) for path in blocks}
    for part in parts.values():
        part.__class__ = Block
    module.run_with({mode: split(graph, blocks, parts, places) for mode, graph in graphs.items()}, device)
    options: dict[str, Any] = {
        "mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype), "shard_placement_fn": _placement
    }  # fmt: skip
    for part in parts.values():
        fully_shard(part, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(module, **options)
    module.sharding = Sharding(tuple(blocks), tuple(rounded), kept)
    hooked = cast(Any, module)
    hooked.register_state_dict_post_hook(_with_plain_tensors)
    hooked.register_load_state_dict_pre_hook(_refuse_assignment)
    return module


def _check(module: HaloModule) -> None:
    if not isinstance(module, HaloModule):
        raise TypeError(f"module is a {type(module).__name__}, expected what sylvester.halo gives")
    if isinstance(module, LoraModule):
        raise CompileError(
            "adapters are not split between ranks: they are small, and the frozen base sends nothing",
            hint="use torch.nn.parallel.DistributedDataParallel with forward_sync_buffers=False",
        )
    if isinstance(module, JointModule):
        raise CompileError("a joint graph is traced for whole weights", hint="use sylvester.halo without joint=True")
    if isinstance(module, FSDPModule):
        raise CompileError("the module is split between ranks already")
    if not dist.is_available() or not dist.is_initialized():
        raise CompileError(
            "torch.distributed has no process group to split the module between",
            hint="call torch.distributed.init_process_group in every process, as torchrun starts them",
        )


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _layouts(module: HaloModule, graph: fx.Graph, ranks: int) -> tuple[dict[str, bool], dict[str, str]]:
    """Weights that can be gathered rounded, with whether they are [in, out], and why others of linears are not."""
    parameters, rounded, kept = dict(module.named_parameters()), dict[str, bool](), dict[str, str]()
    nodes = dict(zip((b.key for b in module.bindings), graph.find_nodes(op="placeholder"), strict=True))
    for key in module.report.rewritten:
        turned = turned_in(nodes[key]) if key in nodes else None
        if key not in parameters or turned is None:
            kept[key] = "something else than linear layers reads it"
        elif turned and parameters[key].shape[1] % ranks:
            kept[key] = f"it is [in, out], and {ranks} ranks do not divide its {parameters[key].shape[1]} columns"
        else:
            rounded[key] = turned
    return rounded, kept


def _places(module: HaloModule) -> dict[int, Place]:
    parameters, found = dict(module.named_parameters()), {}
    for position, bound in enumerate(module.bindings):
        if bound.kind == "weight" and bound.key in parameters:
            holder, _, name = bound.key.rpartition(".")
            found[position] = Place(module.get_submodule(holder), name)
    return found


def _blocks(
    module: HaloModule, graphs: Mapping[bool, fx.GraphModule], places: Mapping[int, Place]
) -> dict[str, tuple[int, ...]]:
    """Members of lists of modules that run apart from each other, with the positions of their parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if path.rpartition(".")[2].isdigit() and not inside and _owns(module, part):
            found[path] = tuple(i for i in places if module.bindings[i].key.startswith(f"{path}."))
    apart = [spans(graph.graph, found) for graph in graphs.values()]
    return {path: own for path, own in found.items() if all(path in known for known in apart)}


def _owns(module: nn.Module, part: nn.Module) -> bool:
    """Whether a part has parameters and shares none with the rest."""
    inside = Counter(id(p) for _, p in part.named_parameters(remove_duplicate=False))
    everywhere = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return bool(inside) and all(everywhere[p] == n for p, n in inside.items())


def _replace(module: HaloModule, key: str, turned: bool, group: Group) -> None:
    """A weight becomes one that FSDP2 gathers rounded, under all its names."""
    report, given = module.report, module.get_parameter(key)
    weight = Weight(key.removesuffix(".weight"), report.level, report.format, turned)
    made = nn.Parameter(Shard(given.detach(), weight, group), requires_grad=given.requires_grad)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is given:
                part._parameters[name] = made
    holder, _, name = key.rpartition(".")
    group.places.append((module.get_submodule(holder), name))


def _placement(parameter: nn.Parameter) -> Split | None:
    """Rows of rotated weights stay whole."""
    return Split(1) if isinstance(parameter, Shard) and parameter.weight.turned else None


def _with_plain_tensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dicts hold the weights as they are."""
    for key, found in state.items():
        if (
            isinstance(found, DTensor)
            and not isinstance(found, nn.Parameter)
            and isinstance(found._local_tensor, Shard)
        ):
            plain = found._local_tensor.plain
            state[key] = DTensor.from_local(
                plain, found.device_mesh, found.placements, run_check=False, shape=found.shape, stride=found.stride()
            )


def _refuse_assignment(module: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        raise CompileError(
            "assign=True would replace weights that are gathered rounded", hint="load_state_dict copies without it"
        )
