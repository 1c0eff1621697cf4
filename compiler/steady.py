"""Does every token of a call of `decode` get the bits that it would get alone? Then drafts can be verified together."""

from __future__ import annotations

import torch

from sylvester.compiler.cache_ops import attention_q
from sylvester.compiler.changes import Refusal
from sylvester.compiler.program import Program
from sylvester.compiler.quantized_ops import ATTENTIONS
from sylvester.compiler.sparse_ops import sparse_glu, sparse_linear
from sylvester.compiler.stages import stages_of

aten = torch.ops.aten
SPARSE = frozenset({sparse_glu.target, sparse_linear.target})
PRODUCTS = frozenset(
    {aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
    | {aten.einsum.default, aten.scaled_dot_product_attention.default, aten.convolution.default, aten.cumsum.default}
)
ATTENTION = (*ATTENTIONS, attention_q.target)


def unsteady(program: Program) -> Refusal | None:
    """The first operation of `decode` whose rounding depends on how many tokens come together."""
    for stage in stages_of(program.info):
        entry = program.entries.get(stage.entry)
        if entry is None:
            return Refusal(f"there is no entry {stage.entry!r}, the program has {list(program.entries)}")
        for node in entry.calls():
            if node.target in SPARSE:
                return Refusal("which weights a sparse kernel reads, and in which order, depends on all tokens", node)
            if node.target in PRODUCTS:
                return Refusal(f"{node.target} sums in an order that depends on how many tokens come together", node)
            if node.target in ATTENTION and node.args[4] is None:
                return Refusal("an attention reads no caches", node)
    return None
