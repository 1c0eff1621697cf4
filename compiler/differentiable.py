"""A graph as a function of its weights that differentiates, with PyTorch's fused attention where it is the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sylvester.compiler import ops
from sylvester.compiler.program import Entry, Output, binding

TAIL = "<tail>"
"""Name under which a function returns the value that its last matrix reads."""

CPU = torch.device("cpu")
Device = torch.device
Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Function:
    """An entry that computes only the results that were asked for."""

    entry: Entry
    module: fx.GraphModule

    @staticmethod
    def of(entry: Entry, wanted: Collection[str], tail: fx.Node | None = None, device: Device = CPU) -> Function:
        """`wanted` names outputs and state slots; `tail` is a node of the entry that is returned as `TAIL`."""
        small = entry.clone()
        names = {node.name: node for node in small.graph.nodes}
        pairs = [(o, n) for o, n in zip(small.outputs, small.results(), strict=True) if o.name in wanted]
        if tail is not None:
            pairs.append((Output("output", TAIL), names[tail.name]))
        small.outputs = [output for output, _ in pairs]
        small.graph.output_node().args = (tuple(node for _, node in pairs),)
        small.sweep()
        for node in small.calls(ops.attention.target):
            node.target = fused_attention
        for node in small.calls():
            if makes_tensor(node):
                node.update_kwarg("device", device)
        return Function(small, fx.GraphModule(torch.nn.Module(), small.graph))

    @property
    def weights(self) -> list[str]:
        """Keys of the weights that the results depend on."""
        return [binding(node).key for node in self.entry.placeholders("weight")]

    def __call__(self, weights: Named, inputs: Named, state: Named) -> dict[str, Tensor]:
        sources = {"weight": weights, "input": inputs, "state": state}
        given = [sources[binding(n).kind][binding(n).key] for n in self.entry.placeholders()]
        found = self.module(*given)
        return {output.name: value for output, value in zip(self.entry.outputs, found, strict=True)}


def makes_tensor(node: fx.Node) -> bool:
    """Whether an ATen op is told the device of its result."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.name == "device" for argument in schema.arguments)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    **optional: Tensor | None,
) -> Tensor:
    """`ops.attention` in memory linear in the keys, also for the gradient, but for masks that are added and the like.

    PyTorch's gradient is wrong where an added mask hides every key from a query.
    """
    added = mask is not None and mask.dtype != torch.bool
    if added or softcap or (window and not causal) or any(x is not None for x in optional.values()):
        return ops.attention.reference(q, k, v, mask, past, scale, causal, window, softcap, **optional)
    k, v = (ops.repeated_heads(t.to(q.dtype), q) for t in (k, v))
    if past is None and not window and (mask is None or not causal):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    seen = ops.visible(q.shape[2], k.shape[2], 0 if past is None else past, causal, window, q.device)
    if mask is not None:
        seen = seen & mask[..., : k.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
