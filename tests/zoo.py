"""The zoo: small models with random weights, built from config, that every part of the compiler is tried on.

    for name in zoo.NAMES:
        case = zoo.case(name)            # built on first use, then cached in this process
        case.model(**case.inputs)

Norms and biases get values that matter (`randomise`), so that a folding mistake shows in the output.
A bare Hugging Face causal LM returns a cache object that torch.export cannot flatten: config.use_cache=False drops it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

import sylvester as sv
from sylvester.compiler.program import Program
from tests import zoo_modules

VOCAB = 199
SIZES = ((2, 11), (1, 17), (3, 7))  # (batch, sequence): the example, then the sizes it must also serve

Inputs = dict[str, Tensor]
Dynamic = dict[str, dict[int, object]]


@dataclass(frozen=True)
class Stack:
    """A run of equal residual blocks; parallel means that all parts of a block read the same value.

    Norms are not counted as parts, wherever they stand. A block that changes the size is no repeat.
    """

    blocks: int
    parts: tuple[str, ...]
    parallel: bool = False


@dataclass(frozen=True)
class Case:
    """A model in eval mode with its inputs at SIZES[0] (`inputs`) and at the other sizes (`other`)."""

    name: str
    model: nn.Module
    inputs: Inputs
    other: tuple[Inputs, ...]
    stacks: tuple[Stack, ...]
    causal_lm: bool
    dynamic: Dynamic | None

    @property
    def blocks(self) -> int:
        return sum(stack.blocks for stack in self.stacks)

    @property
    def parts(self) -> tuple[str, ...]:
        return self.stacks[0].parts if self.stacks else ()

    @property
    def dynamic_shapes(self) -> Dynamic:
        """For torch.export: what the case states, else batch and sequence of every input left to torch."""
        return self.dynamic or {key: {0: Dim.AUTO, 1: Dim.AUTO} for key in self.inputs}


Sample = Callable[[int, int], Inputs]


@dataclass(frozen=True)
class Entry:
    """How to build a case: `sample(batch, length)` makes inputs."""

    build: Callable[[], nn.Module]
    sample: Sample
    stacks: tuple[Stack, ...] = ()
    causal_lm: bool = False
    dynamic: Dynamic | None = None


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def token_ids(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length)}


def masked_ids(batch: int, length: int) -> Inputs:
    """Token ids with the end of the first row padded (id 1), so that the mask matters."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def pair_ids(batch: int, length: int) -> Inputs:
    return {"input_ids": tokens(batch, length), "decoder_input_ids": tokens(batch, length - 2)}


def target_and_memory(batch: int, length: int) -> Inputs:
    return {"target": tokens(batch, length - 2), "memory": torch.randn(batch, length, 48)}


def images(size: int) -> Sample:
    return lambda batch, length: {"pixel_values": torch.randn(batch, 3, size, size)}


def mel_frames(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 20, 60)}


def rows(batch: int, length: int) -> Inputs:
    return {"x": torch.randn(batch, length, 23)}


def causal(cls: type, config: type, layers: int, **options: object) -> Entry:
    """A Hugging Face causal LM; Stack(parallel) is for models that add attention and FFN of one normed input."""
    parallel = bool(options.pop("parallel", False))
    settings = {"vocab_size": VOCAB, "use_cache": False, "pad_token_id": None, **options}
    stack = Stack(layers, ("attention", "ffn"), parallel)
    return Entry(lambda: cls(config(**settings)), token_ids, (stack,), causal_lm=True)


def encoder(cls: type, config: type, layers: int, **options: object) -> Entry:
    settings = {"vocab_size": VOCAB, **options}
    return Entry(lambda: cls(config(**settings)), masked_ids, (Stack(layers, ("attention", "ffn")),))


ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def t5_config() -> hf.T5Config:
    return hf.T5Config(
        vocab_size=VOCAB, d_model=48, d_kv=12, d_ff=88, num_layers=3, num_decoder_layers=4, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip


def vit() -> nn.Module:
    return hf.ViTModel(
        hf.ViTConfig(
            hidden_size=48, intermediate_size=104, num_hidden_layers=4, num_attention_heads=6,
            image_size=24, patch_size=8,
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    return WhisperEncoder(
        hf.WhisperConfig(
            vocab_size=VOCAB, d_model=48, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=104,
            num_mel_bins=20, max_source_positions=30, pad_token_id=0, decoder_start_token_id=0,
            begin_suppress_tokens=None, **ENDS,
        )
    )  # fmt: skip


def batch_of(key: str) -> Dynamic:
    return {key: {0: Dim.DYNAMIC}}


LLAMA = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 120, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
GQA = {**LLAMA, "num_key_value_heads": 2}
BERT = {
    "num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 104, "num_attention_heads": 6,
    "max_position_embeddings": 64,
}  # fmt: skip
BLOCK = Stack(4, ("attention", "ffn"))
CROSS_BLOCK = Stack(4, ("attention", "cross_attention", "ffn"))

ENTRIES: dict[str, Entry] = {
    "llama-mha": causal(hf.LlamaForCausalLM, hf.LlamaConfig, 4, **LLAMA, num_key_value_heads=4),
    "llama-gqa": causal(hf.LlamaForCausalLM, hf.LlamaConfig, 4, **GQA),
    "llama-tied": causal(hf.LlamaForCausalLM, hf.LlamaConfig, 4, **GQA, tie_word_embeddings=True),
    "mistral": causal(hf.MistralForCausalLM, hf.MistralConfig, 4, **GQA, sliding_window=8),
    "qwen2": causal(hf.Qwen2ForCausalLM, hf.Qwen2Config, 4, **GQA, tie_word_embeddings=True),
    "qwen3": causal(hf.Qwen3ForCausalLM, hf.Qwen3Config, 4, **GQA, head_dim=24),
    "gemma": causal(hf.GemmaForCausalLM, hf.GemmaConfig, 4, **LLAMA, num_key_value_heads=1, head_dim=24),
    "phi": causal(hf.PhiForCausalLM, hf.PhiConfig, 4, **LLAMA, partial_rotary_factor=0.5, parallel=True),
    "gpt2": causal(hf.GPT2LMHeadModel, hf.GPT2Config, 4, n_layer=4, n_embd=48, n_head=6, n_positions=64, **ENDS),
    "gpt-neox": causal(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, 4, **LLAMA, parallel=True),
    "opt": causal(
        hf.OPTForCausalLM, hf.OPTConfig, 5, num_hidden_layers=5, hidden_size=48, word_embed_proj_dim=48, ffn_dim=104,
        num_attention_heads=6, max_position_embeddings=64,
    ),
    "bert": encoder(hf.BertModel, hf.BertConfig, 4, **BERT),
    "roberta": encoder(hf.RobertaModel, hf.RobertaConfig, 4, **BERT, pad_token_id=1),
    "distilbert": encoder(
        hf.DistilBertModel, hf.DistilBertConfig, 4, n_layers=4, dim=48, hidden_dim=104, n_heads=6,
        max_position_embeddings=64,
    ),
    "vit": Entry(vit, images(24), (BLOCK,), dynamic=batch_of("pixel_values")),
    "whisper-encoder": Entry(whisper, mel_frames, (BLOCK,), dynamic=batch_of("input_features")),
    "t5": Entry(
        lambda: hf.T5ForConditionalGeneration(t5_config()), pair_ids, (Stack(3, ("attention", "ffn")), CROSS_BLOCK)
    ),
    "t5-encoder": Entry(lambda: hf.T5EncoderModel(t5_config()), masked_ids, (Stack(3, ("attention", "ffn")),)),
    "torch-encoder": Entry(zoo_modules.TorchEncoder, token_ids, (BLOCK,)),
    "torch-decoder": Entry(zoo_modules.TorchDecoder, target_and_memory, (CROSS_BLOCK,)),
    "odd-names": Entry(zoo_modules.Weaver, lambda b, s: {"pieces": tokens(b, s)}, (BLOCK,), causal_lm=True),
    "resnet": Entry(
        zoo_modules.ResNet, images(20), (Stack(3, ("conv",)), Stack(2, ("conv",))), dynamic=batch_of("pixel_values")
    ),
    "convnext": Entry(
        zoo_modules.ConvNeXt, images(20), (Stack(3, ("conv",)), Stack(2, ("conv",))), dynamic=batch_of("pixel_values")
    ),
    "mobilenet": Entry(
        zoo_modules.MobileNet, images(20), (Stack(2, ("conv",)), Stack(3, ("conv",))), dynamic=batch_of("pixel_values")
    ),
    "mlp": Entry(zoo_modules.Mlp, rows),
}  # fmt: skip
NAMES = tuple(ENTRIES)
CAUSAL = tuple(name for name, entry in ENTRIES.items() if entry.causal_lm)
DIVERSE = ("llama-tied", "qwen3", "gemma", "phi", "gpt2", "gpt-neox", "opt", "odd-names")
"""Causal LMs of which no two are alike: norms, positions, biases, tied weights, parallel parts, one written by hand."""


@functools.cache
def case(name: str) -> Case:
    """Build one case; the weights and inputs depend on the name only."""
    entry = ENTRIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        model = entry.build().eval()
        randomise(model)
        inputs, *other = (entry.sample(*size) for size in SIZES)
    return Case(name, model, inputs, tuple(other), entry.stacks, entry.causal_lm, entry.dynamic)


@functools.cache
def traced(name: str) -> Program:
    """The case as a Program, captured once in this process: passes edit clones of it."""
    found = case(name)
    return sv.trace(found.model, found.inputs, dynamic=found.dynamic)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every matrix unit gain, and move norm weights, biases and BatchNorm statistics off ones and zeros."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=_std(module, parameter))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)


def to_double(inputs: Inputs) -> Inputs:
    """The same inputs for the float64 copy of a model; token ids and masks stay integers."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def tensors(output: object) -> list[Tensor]:
    """The tensors of a model output (tensor, tuple, dict or Hugging Face ModelOutput) in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _std(module: nn.Module, parameter: Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 0.5
    fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
    return 1 / math.sqrt(fan_in)
