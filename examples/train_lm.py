"""Text files -> a small Llama-style language model in a Hugging Face folder (the one in examples/models/novels-7m).

    python examples/train_lm.py --train DATA/train --valid DATA/valid --out examples/models/novels-7m

A byte-level BPE tokenizer of 4096 tokens, 16 layers of width 192, bf16 matmuls over fp32 master weights, Muon for the
matrices and AdamW for the rest. The run writes a checkpoint every few minutes; after Ctrl-C the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
CONTEXT = 512
SHORT_CONTEXT = 256  # most steps learn on shorter windows: attention is half of a long step's time
SHORT_SHARE = 0.8
TOKENS_PER_STEP = 8192
CHECKPOINT_EVERY = 200


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(options.train, options.work / "tokenizer.json")
    train_tokens = encode(tokenizer, options.train)
    model = LlamaForCausalLM(llama_config())
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train_tokens) / 1e6:.2f} M tokens"
    )
    train(model, train_tokens, options)
    save(model, tokenizer, options.out)
    print(json.dumps(evaluate(model, tokenizer, options.valid), indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of .txt files to learn from")
    parser.add_argument("--valid", type=Path, required=True, help="folder of .txt files to report perplexity on")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/train_lm"), help="checkpoints")
    parser.add_argument("--passes", type=float, default=3.0, help="passes over the text")
    parser.add_argument("--max-steps", type=int, default=None, help="stop early (to try the script)")
    return parser.parse_args()


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )


def texts(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"no .txt file in {folder}")
    return [file.read_text() for file in files]


def train_tokenizer(folder: Path, path: Path) -> Tokenizer:
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((line for text in texts(folder) for line in text.splitlines(keepends=True)), trainer)
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, folder: Path) -> Tensor:
    """All texts of a folder as one row of token ids, each text opened by the end-of-text token."""
    ids: list[int] = []
    for text in texts(folder):
        ids.append(tokenizer.token_to_id(END))
        for line in tokenizer.encode_batch(text.splitlines(keepends=True)):
            ids.extend(line.ids)
    return torch.tensor(ids)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    inner = dict(model.model.layers.named_parameters())
    matrices = [p for p in inner.values() if p.ndim == 2]
    scales = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02)
    adam = torch.optim.AdamW(
        [{"params": [model.model.embed_tokens.weight], "lr": 6e-3}, {"params": scales, "lr": 6e-3}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [muon, adam]


def windows(tokens: Tensor, steps: int, context: int, seed: int) -> Tensor:
    """Token positions of shape (steps, rows, context + 1): each pass cuts the text at a new phase and shuffles."""
    random = torch.Generator().manual_seed(seed)
    rows = TOKENS_PER_STEP // context
    offsets: list[Tensor] = []
    while sum(map(len, offsets)) < steps * rows:
        phase = int(torch.randint(context, (), generator=random))
        starts = torch.arange(phase, len(tokens) - context - 1, context)
        offsets.append(starts[torch.randperm(len(starts), generator=random)])
    first = torch.cat([*offsets, torch.empty(0, dtype=torch.long)])[: steps * rows].reshape(steps, rows, 1)
    return first + torch.arange(context + 1)


def learning_rate(step: int, steps: int) -> float:
    """Warm up, hold, then fall linearly to zero over the last 60 %."""
    warmup, decay = min(1.0, (step + 1) / 60), min(1.0, (steps - step) / (0.6 * steps))
    return warmup * decay


def train(model: LlamaForCausalLM, tokens: Tensor, options: argparse.Namespace) -> None:
    steps = int(options.passes * len(tokens) / TOKENS_PER_STEP)
    short = int(SHORT_SHARE * steps)
    positions = [*windows(tokens, short, SHORT_CONTEXT, 0), *windows(tokens, steps - short, CONTEXT, 1)]
    optimizers = make_optimizers(model)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = resume(model, optimizers, options.work / "checkpoint.pt")
    loss_of = torch.compile(lambda ids, labels: step_loss(model, ids, labels), dynamic=False)
    started, since, average = time.time(), first, math.nan
    for step in range(first, min(steps, options.max_steps or steps)):
        window = tokens[positions[step]]
        loss = loss_of(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            pace = (time.time() - started) / (step + 1 - since)
            left = (steps - step) * pace / 60
            rate = TOKENS_PER_STEP / pace
            print(f"step {step}/{steps} loss {average:.3f} {rate:.0f} tokens/s, {left:.0f} min left", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint(model, optimizers, step + 1, options.work / "checkpoint.pt")


def step_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def checkpoint(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int, path: Path) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def resume(model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], path: Path) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"resumed at step {state['step']}")
    return int(state["step"])


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> dict[str, float]:
    """Held-out perplexity of the stored (bf16-rounded) weights in fp32, non-overlapping windows of CONTEXT tokens."""
    model = model.float().eval()
    tokens = encode(tokenizer, folder)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = tokens[start : start + CONTEXT + 1][None]
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    size = sum(len(text.encode()) for text in texts(folder))
    per_byte = total / size
    return {
        "tokens": count,
        "bytes": size,
        "perplexity_per_token": math.exp(total / count),
        "perplexity_per_byte": math.exp(per_byte),
        "bits_per_byte": per_byte / math.log(2),
    }


if __name__ == "__main__":
    main()
