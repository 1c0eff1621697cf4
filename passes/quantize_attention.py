"""attention(q, k, v) -> attention_bf16(q, k, v): products of bfloat16 operands, softmax and sums in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sylvester.compiler import ops
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program, value
from sylvester.compiler.quantized_ops import attention_bf16


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Faster where the CPU multiplies bfloat16 and there are many queries; elsewhere kernels stay in float32.

    Goes after `derive-decode`, which looks for plain attention.
    """

    name: ClassVar[str] = "quantize-attention"
    contract: ClassVar[Contract] = "lossy"

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for entry in program.entries.values():
            for node in entry.calls(ops.attention.target):
                if (found := value(node).dtype) != torch.float32:
                    changes.refuse("attention", Refusal(f"it computes in {found}, expected torch.float32", node))
                    continue
                new = entry.emit(attention_bf16.target, *node.args, before=node, made_by=self.name)
                changes.apply("attention", node)
                entry.replace(node, new)
        return changes
