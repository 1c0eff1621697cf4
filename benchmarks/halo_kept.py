"""Bytes that a forward pass keeps for the backward pass: in all, of linear layers, and by the op that saves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LINEARS = ("AddmmBackward0", "HaloBackward")
"""Linear layers; the head, which has no bias, is another op."""


def kept(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of everything but weights, rounded ones too; each memory once and whole."""
    addresses = {p.untyped_storage().data_ptr() for p in module.parameters()}
    report = getattr(module, "report", None)
    rounded = {module.get_parameter(key).shape for key in report.rewritten} if report else set()
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in addresses and not (tensor.element_size() == 1 and tensor.shape in rounded):
            seen[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward().backward()
    return sum(seen.values())


def by_op(module: nn.Module, forward: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes by the op that saves them, the last one in the model of several; without weights."""
    addresses = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[str, int] = {}
    for node in _nodes(forward().grad_fn):
        name = type(node).__name__
        for tensor in _saved(node):
            address = tensor.untyped_storage().data_ptr()
            if address not in addresses:
                addresses.add(address)
                found[name] = found.get(name, 0) + tensor.untyped_storage().nbytes()
    return found


def _nodes(last: Any) -> Iterator[Any]:
    """From the loss back."""
    seen, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _saved(node: Any) -> list[Tensor]:
    if type(node).__name__ == "HaloBackward":
        return list(node.saved_tensors[:2])
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    return [x for x in values if isinstance(x, Tensor)]
