"""Seconds to bring a deep model into canonical form and to find its blocks.

python -m benchmarks.structure [layers]
"""

from __future__ import annotations

import sys
import time

import torch
import transformers as hf
from torch import nn

from sylvester.compiler.structure import discover
from sylvester.compiler.trace import capture
from sylvester.passes.canonicalize import Canonicalize

REPEATS = 3


def models(layers: int) -> dict[str, nn.Module]:
    sizes = {"vocab_size": 199, "use_cache": False}
    llama = {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 120, "num_attention_heads": 4}
    bert = {"num_hidden_layers": layers, "hidden_size": 48, "intermediate_size": 104, "num_attention_heads": 6}
    return {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **llama, num_key_value_heads=2)),
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_layer=layers, n_embd=48, n_head=6)),
        "bert": hf.BertModel(hf.BertConfig(**sizes, **bert)),
    }


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    print(f"{layers} layers, best of {REPEATS}")
    print("model      nodes            trace s  canonical s  structure s  blocks")
    for name, model in models(layers).items():
        start = time.perf_counter()
        traced = capture(model.eval(), {"input_ids": torch.randint(0, 199, (2, 11))})
        trace = time.perf_counter() - start
        canonical, structure, blocks, nodes = [], [], 0, 0
        for _ in range(REPEATS):
            program = traced.clone()
            start = time.perf_counter()
            Canonicalize().run(program)
            canonical.append(time.perf_counter() - start)
            start = time.perf_counter()
            blocks = len(discover(program).blocks)
            structure.append(time.perf_counter() - start)
            nodes = len(program.main.graph.nodes)
        sizes = f"{len(traced.main.graph.nodes)} -> {nodes}"
        print(f"{name:9}  {sizes:15} {trace:8.2f} {min(canonical):12.3f} {min(structure):12.3f} {blocks:7}")


if __name__ == "__main__":
    main()
