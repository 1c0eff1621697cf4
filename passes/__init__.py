"""Passes by name. `sylvester.passes.Canonicalize` is the class; modules are imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any

PASSES = {
    "canonicalize": "sylvester.passes.canonicalize:Canonicalize",
    "derive-decode": "sylvester.passes.derive_decode:DeriveDecode",
    "depth-schedule": "sylvester.passes.depth_schedule:DepthSchedule",
    "draft": "sylvester.passes.draft:Draft",
    "drop-sublayers": "sylvester.passes.drop_sublayers:DropSublayers",
    "equalize": "sylvester.passes.equalize:Equalize",
    "finetune": "sylvester.passes.finetune:Finetune",
    "fold-constants": "sylvester.passes.fold_constants:FoldConstants",
    "fold-norms": "sylvester.passes.fold_norms:FoldNorms",
    "fold-weights": "sylvester.passes.fold_weights:FoldWeights",
    "last-logits": "sylvester.passes.last_logits:LastLogits",
    "pad-prompt": "sylvester.passes.pad_prompt:PadPrompt",
    "quantize": "sylvester.passes.quantize:Quantize",
    "quantize-attention": "sylvester.passes.quantize_attention:QuantizeAttention",
    "quantize-cache": "sylvester.passes.quantize_cache:QuantizeCache",
    "raise-attention": "sylvester.passes.raise_attention:RaiseAttention",
    "raise-glu": "sylvester.passes.raise_glu:RaiseGlu",
    "raise-norms": "sylvester.passes.raise_norms:RaiseNorms",
    "raise-rope": "sylvester.passes.raise_rope:RaiseRope",
    "rotate-hadamard": "sylvester.passes.rotate_hadamard:RotateHadamard",
    "share-attention": "sylvester.passes.share_attention:ShareAttention",
    "share-basis": "sylvester.passes.share_basis:ShareBasis",
    "share-blocks": "sylvester.passes.share_blocks:ShareBlocks",
    "share-prefix": "sylvester.passes.share_prefix:SharePrefix",
    "skip-ffn": "sylvester.passes.skip_ffn:SkipFFN",
    "skip-layers": "sylvester.passes.skip_layers:SkipLayers",
    "sparsify-activations": "sylvester.passes.sparsify_activations:SparsifyActivations",
    "split-linears": "sylvester.passes.split_linears:SplitLinears",
    "tensor-parallel": "sylvester.passes.tensor_parallel:TensorParallel",
}
RECIPES = {
    "bf16": "sylvester.passes.recipes:BF16",
    "fp16": "sylvester.passes.recipes:FP16",
    "fp8": "sylvester.passes.recipes:FP8",
    "w4a16": "sylvester.passes.recipes:W4A16",
    "w4a4": "sylvester.passes.recipes:W4A4",
    "w4a8": "sylvester.passes.recipes:W4A8",
    "w4a8kv4": "sylvester.passes.recipes:W4A8KV4",
    "w8a16": "sylvester.passes.recipes:W8A16",
    "w8a8": "sylvester.passes.recipes:W8A8",
}
"""Names of whole lists of passes."""


def __getattr__(name: str) -> Any:
    for place in PASSES.values():
        module, _, attribute = place.partition(":")
        if attribute == name:
            return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(place.partition(":")[2] for place in PASSES.values())])
