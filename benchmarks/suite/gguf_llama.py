"""Llama as a GGUF file: fp32, bf16, Q8_0 or Q4_0 matrices, and a vocabulary of made-up words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from benchmarks.suite.shapes import Checkpoint

KINDS = {"fp32": (Kind.F32, 0), "bf16": (Kind.BF16, 32), "int8": (Kind.Q8_0, 7), "int4": (Kind.Q4_0, 2)}
"""Tensor type and the number of the file type."""

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write(path: Path, checkpoint: Checkpoint, precision: str, bytes_known: int = 256) -> None:
    config = checkpoint.config
    kind, file_type = KINDS[precision]
    writer = gguf.GGUFWriter(str(path), "llama")
    describe(writer, config)
    writer.add_file_type(file_type)
    vocabulary(writer, config.vocab_size, bytes_known)
    for name, tensor in checkpoint.tensors().items():
        if name == "lm_head.weight":
            continue
        array = interleaved(name, tensor.float().numpy(), config)
        if array.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(renamed(name), np.ascontiguousarray(array))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(array), kind)
            writer.add_tensor(renamed(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def vocabulary(writer: gguf.GGUFWriter, size: int, bytes_known: int) -> None:
    """A SentencePiece vocabulary: the loader insists on one. A space is known where not every byte is."""
    space = ["\u2581"] if bytes_known < 256 else []
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(bytes_known))]
    words = [*space, *(f"\u2581w{number}" for number in range(size - len(pieces) - len(space)))]
    types = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece in pieces + words])
    writer.add_token_scores([0.0] * len(pieces) + [-float(number) for number in range(len(words))])
    writer.add_token_types(
        [types.UNKNOWN, types.CONTROL, types.CONTROL, *[types.BYTE] * bytes_known, *[types.NORMAL] * len(words)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def renamed(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, index, *parts, last = name.split(".")
    return f"blk.{index}.{NAMES['.'.join(parts)]}.{last}"


def interleaved(name: str, weight: NDArray[Any], config: Any) -> NDArray[Any]:
    """ggml rotates neighbours, Hugging Face the two halves of a head: rows of q and k change places."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
