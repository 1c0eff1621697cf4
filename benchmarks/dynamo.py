"""torch.compile with this backend beside inductor and eager PyTorch, on whole Hugging Face models in float32.

    python -m benchmarks.dynamo [--runs 9] [--threads 2] [--models encode prefill]

encode is MiniLM's shape (6 layers, 384 features) over 1 x 128 tokens, prefill is S (12 layers, 768 features, 32,000
tokens in the vocabulary) over 1 x 512 tokens. Random weights. Inductor needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import transformers as hf

from benchmarks.measure import Engine, measure
from sylvester.compiler import dynamo
from sylvester.compiler.dynamo import LeftToPyTorch

Case = tuple[torch.nn.Module, dict[str, torch.Tensor], str]


def encode() -> Case:
    config = hf.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    ids = torch.randint(5, 30_000, (1, 128))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return hf.BertModel(config, add_pooling_layer=False), inputs, "last_hidden_state"


def prefill() -> Case:
    config = hf.LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config), {"input_ids": torch.randint(5, 30_000, (1, 512))}, "logits"


CASES: dict[str, Callable[[], Case]] = {"encode": encode, "prefill": prefill}


def run(name: str, runs: int, threads: int) -> None:
    torch.manual_seed(0)
    model, inputs, output = CASES[name]()
    model.eval()
    ours = torch.compile(model, backend="sylvester", options={"threads": threads})
    functions = {"eager": model, "inductor": torch.compile(model), "sylvester": ours}
    with torch.inference_mode():
        exact = np.asarray(model.double()(**inputs)[output])
        model.float()
        engines = [
            Engine(label, "fp32", partial(function, **inputs), partial(_array, function, inputs, output))
            for label, function in functions.items()
        ]
        rows = measure(name, engines, exact, runs)
    base = next(row.median for row in rows if row.engine == "inductor")
    for row in rows:
        print(
            f"{name:8} {row.engine:10} {row.median:8.2f} ms  {base / row.median:5.2f}x  error {row.error:.1e}",
            flush=True,
        )


def _array(
    function: Callable[..., dict[str, torch.Tensor]], inputs: dict[str, torch.Tensor], output: str
) -> np.ndarray:
    return np.asarray(function(**inputs)[output])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    warnings.simplefilter("always", LeftToPyTorch)
    torch.set_num_threads(options.threads)
    for name in options.models:
        run(name, options.runs, options.threads)
    print(*dynamo.report(), sep="\n")


if __name__ == "__main__":
    main()
