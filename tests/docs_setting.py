"""What the pages take for granted: a folder with the examples, and the names that stand for a reader's own things."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers as hf

import sylvester as sv
from benchmarks.quality.recipes import MODEL
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.rewrite import Rule, rewrite
from tests import zoo
from tests.docs_pages import ROOT

NOVELS = "examples/models/novels-7m"


def settle(folder: Path, *, shipped: bool) -> None:
    """`examples/` and a text, in which the language model is the shipped one or a smaller one in its place."""
    texts = (ROOT / "examples/data/wuthering-heights.txt").read_text(encoding="utf-8")
    for name in ("text.txt", "texts.txt"):
        (folder / name).write_text(texts[:12_000], encoding="utf-8")
    if shipped:
        (folder / "examples").symlink_to(ROOT / "examples")
    else:
        write_stand_in(folder / NOVELS)
        (folder / "examples/data").symlink_to(ROOT / "examples/data")


def write_stand_in(folder: Path) -> None:
    """Two layers and the tokenizer of the shipped model; it knows how frequent each token is."""
    config = hf.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(MODEL) / name, folder / name)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((ROOT / "examples/data/wuthering-heights.txt").read_text(encoding="utf-8")[:40_000])["input_ids"]
    frequency = torch.bincount(torch.tensor(ids), minlength=4096) + 0.1
    with torch.no_grad():
        # The first feature is the same large number for every token: after the last norm it is sqrt(32).
        model.model.embed_tokens.weight[:, 0] = 8.0
        model.lm_head.weight[:, 0] = (frequency / frequency.sum()).log() / 32**0.5
    model.save_pretrained(folder)


def common() -> dict[str, Any]:
    text = Path("text.txt").read_text(encoding="utf-8")
    return {"sv": sv, "torch": torch, "np": np, "texts": [text[n : n + 1500] for n in range(0, 6000, 1500)]}


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * 1.0)


def images() -> dict[str, Any]:
    """A classifier of images."""
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"model": hf.ViTForImageClassification(config).eval(), "images": inputs["pixel_values"], "inputs": inputs}


def ids() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[5, 17, 8, 3]]), "ids": np.array([[5, 17, 8, 3]])}


def classifier() -> dict[str, Any]:
    case = zoo.case("mlp")
    return {"model": case.model, "inputs": case.inputs}


def rules() -> dict[str, Any]:
    """What a file of passes imports, and a model that the pass of the page fits."""
    imported = {"dataclass": dataclass, "ClassVar": ClassVar, "Contract": Contract, "Tensor": torch.Tensor}
    own = {"Changes": Changes, "Pass": Pass, "Program": Program, "Rule": Rule, "rewrite": rewrite}
    return {**imported, **own, "model": Scaled(), "inputs": (torch.randn(2, 3),)}


def program() -> dict[str, Any]:
    case = zoo.case("mlp")
    return {"program": sv.trace(case.model, case.inputs)}


def talk() -> dict[str, Any]:
    """A compiled language model, and questions of as many tokens each."""
    system, questions = (
        "You are a sailor, and you have been at sea for years. " * 8,
        ["Where?", "When?", "Who?", "How?"],
    )
    return {"model": sv.compile(NOVELS), "system": system, "questions": questions, "path": NOVELS, **ids()}


def budget() -> dict[str, Any]:
    return {"model": NOVELS, "budget": sv.Budget(size="4MB")}


SETTINGS: dict[str, tuple[Callable[[], dict[str, Any]], ...]] = {
    "README.md": (images, ids),
    "docs/extending.md": (rules,),
    "docs/generation.md": (talk,),
    "docs/search.md": (budget,),
    "docs/sharing.md": (program,),
    "docs/tvm.md": (classifier,),
}
"""By page, on top of `common`: what its examples call a reader's own."""


def names(page: str) -> dict[str, Any]:
    found = common()
    for setting in SETTINGS.get(page, ()):
        found |= setting()
    return found
