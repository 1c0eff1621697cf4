"""The models S, L and B: Hugging Face configurations with seeded random weights, written once to a folder."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from benchmarks.suite.cache import cached
from benchmarks.suite.sizes import BERT, LLAMAS

COMMON = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder in `models`; `load` builds the module from it in a dtype."""

    shape: str
    models: Path

    @functools.cached_property
    def folder(self) -> Path:
        return cached(self.models / f"{self.shape}-checkpoint", write_checkpoint, self.shape)

    @property
    def config(self) -> LlamaConfig:
        """Of S and L."""
        return llama_config(self.shape)

    def file(self, name: str) -> Path:
        return self.models / f"{self.shape}-{name}"

    def load(self, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
        kind = BertModel if self.shape == "B" else LlamaForCausalLM
        options = {"add_pooling_layer": False} if self.shape == "B" else {}
        return kind.from_pretrained(self.folder, dtype=dtype, attn_implementation=attention, **options).eval()

    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            found |= load_file(path)
        return found


def llama_config(shape: str) -> LlamaConfig:
    settings = dict(LLAMAS[shape])
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    return LlamaConfig(**COMMON, **settings, rope_parameters=rope)


def write_checkpoint(folder: Path, shape: str) -> None:
    """Norm weights and biases are moved off ones and zeros, so that leaving one out shows in the error."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if shape == "B":
        model = BertModel(BertConfig(**BERT), add_pooling_layer=False)
    else:
        model = LlamaForCausalLM(llama_config(shape))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def token_ids(shape: str, batch: int, length: int) -> Tensor:
    vocabulary = (BERT if shape == "B" else LLAMAS[shape])["vocab_size"]
    return torch.randint(5, int(vocabulary) - 5, (batch, length), generator=torch.Generator().manual_seed(1))
