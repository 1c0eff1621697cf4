"""The sizes of the models S, L and B, as Hugging Face configurations name them; needs no package."""

from __future__ import annotations

CONTEXT = 256
PROMPT = 512
SEQUENCE = 128
CAPACITY = 1024
"""Slots of the KV caches that an engine allocates itself."""

LLAMAS = {
    "S": {
        "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12,
        "intermediate_size": 2048, "vocab_size": 32000, "rope_theta": 1e4, "max_position_embeddings": CAPACITY,
    },
    "L": {
        "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": CAPACITY,
    },
}  # fmt: skip
BERT = {
    "num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536,
    "vocab_size": 30522,
}  # fmt: skip


def parameters(shape: str) -> tuple[int, int]:
    """Weights of the linear layers of all blocks, and of the language model's head."""
    if shape == "B":
        width, hidden, layers = BERT["hidden_size"], BERT["intermediate_size"], BERT["num_hidden_layers"]
        return layers * (4 * width * width + 2 * width * hidden), 0
    sizes = LLAMAS[shape]
    width, hidden = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    shared = int(sizes["num_key_value_heads"]) / int(sizes["num_attention_heads"])
    block = int(2 * width * width * (1 + shared)) + 3 * width * hidden
    return int(sizes["num_hidden_layers"]) * block, width * int(sizes["vocab_size"])
