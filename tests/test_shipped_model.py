"""The language model in the repository: its quality on held-out text, and the compiled artefact beside PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import sylvester as sv

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "models" / "novels-7m"
HELD_OUT = EXAMPLES / "data" / "wuthering-heights.txt"
CONTEXT = 256
FIRST_TOKEN = """
import sys
import sylvester as sv

tokens = sv.load(sys.argv[1]).generate("Once upon a time", max_new_tokens=3, stream=True)
assert next(iter(tokens))
assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def compiled():
    with sv.compile(FOLDER, target=sv.Target("cpu", isas=("avx2",)), threads=2) as made:
        yield made


@pytest.fixture(scope="module")
def windows():
    ids = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(HELD_OUT.read_text()).ids
    return torch.tensor(ids[: 16 * (CONTEXT + 1)]).reshape(16, CONTEXT + 1)


def loss(logits, windows):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


@pytest.mark.slow
def test_perplexity_on_held_out_text(compiled, windows):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64)
    with torch.no_grad():
        expected = loss(model(input_ids=windows[:, :-1]).logits, windows)

    assert loss(compiled(input_ids=windows[:, :-1]).logits, windows) == pytest.approx(expected, abs=1e-5)
    assert math.exp(expected) < 60


@pytest.mark.slow
def test_first_token_needs_no_torch(compiled, tmp_path):
    compiled.save(tmp_path / "artefact")
    command = [sys.executable, "-c", FIRST_TOKEN, str(tmp_path / "artefact")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
