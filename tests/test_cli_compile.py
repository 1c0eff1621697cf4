"""The command `compile`, and what other commands make of models: what is saved, budgets, drafts, errors, interrupts."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sylvester.__main__ import main
from sylvester.compiler.manifest import DraftSpec, read
from tests.test_cli import failure, run_json

MODEL = """
import time
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval(), (torch.randn(3, 6),)

def slow():
    print("started", flush=True)
    time.sleep(60)

def triple():
    return 1, 2, 3

def language():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "use_cache": False}
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    config = LlamaConfig(num_hidden_layers=2, initializer_range=0.3, **sizes, **heads)
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(61, (2, 7))}
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return tmp_path


def test_compile_then_show(models, capsys):
    found = run_json(capsys, "compile", "cli_models:factory", "--target", "null", "-o", "out")

    assert found["entries"] == ["forward"]
    assert run_json(capsys, "show", "out")["target"] == "null"
    assert main(["bench", "out"]) == 1
    assert "has no code to run 'forward'" in capsys.readouterr().err


def test_compile_with_named_passes(models, capsys):
    run_json(
        capsys, "compile", "cli_models:factory", "--target", "null", "-o", "out", "--passes", "canonicalize, raise-glu"
    )

    assert read(Path("out")).passes == ("canonicalize", "raise-glu")


def test_compile_with_a_draft(models, capsys):
    command = ["compile", "cli_models:language", "--target", "null", "-o", "out"]

    found = run_json(capsys, *command, "--draft", "skip-layers(layers=(1,)), ngram")

    assert "draft" in found["entries"]
    assert found["ledger"][-1]["contract"] == "drafted"
    assert read(Path("out")).generation.draft == DraftSpec("draft", True)
    assert read(Path("out")).passes[-1].startswith("draft(skip-layers(")


@pytest.fixture
def budgeted(models):
    """The command that compiles a language model with texts of its own, but for the budget."""
    model, ids = importlib.import_module("cli_models").language()[0], torch.arange(3, 7)[:, None]
    with torch.no_grad():
        while ids.shape[1] < 12:
            ids = torch.cat([ids, (2 * model(ids).logits[:, -1]).softmax(-1).multinomial(1)], 1)
    np.save("ids.npy", ids.numpy())
    return ["compile", "cli_models:language", "--target", "null", "-o", "out", "--calibration", "ids.npy", "--budget"]


def test_compile_keeps_a_budget(budgeted, capsys):
    found = run_json(capsys, *budgeted, "size=16kB, max_kl=0.5")

    search = json.loads(Path("out", "report.json").read_text())["search"]
    chosen, final = search["chosen"]["measured"], found["ledger"][-1]["after"]
    assert chosen["size"] == final["parameter_bytes"] <= 16_000
    assert chosen["max_kl"] <= 0.5
    assert [layer["layer"] for layer in search["layers"]] == ["0", "1"]
    assert any(step.startswith("quantize") for step in read(Path("out")).passes)


def test_a_budget_that_cannot_be_kept_names_the_nearest(budgeted, capsys):
    err = failure(capsys, *budgeted, "size=100B")

    assert "size is bounded by 100 B" in err
    assert "the nearest point has size" in err
    assert "hint: give at least size=" in err
    assert not Path("out").exists()


def test_show_a_model(models, capsys):
    assert main(["show", "cli_models:factory"]) == 0
    assert "entry forward(" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no model 'nothing'"),
        (["no_such_module:factory"], "no module 'no_such_module'"),
        (["cli_models:nothing"], "'cli_models' has no function 'nothing'"),
        (["cli_models:triple"], "returned 3 values, expected a module or (module, example_inputs)"),
        (["cli_models:factory", "--target", "cup"], "did you mean 'cpu' or 'cuda'?"),
        (["cli_models:factory", "--target", "null", "--passes", "cannonicalize"], "did you mean 'canonicalize'?"),
        (["cli_models:factory", "--threads", "0"], "threads must be at least 1, found 0"),
        (["cli_models:factory", "--target", "null", "--passes", "skip-layers"], "give either speedup or layers"),
        (
            ["cli_models:factory", "--budget", "size=3parsec"],
            "size is '3parsec', expected bytes as a number, or a text such",
        ),
        (
            ["cli_models:factory", "--budget", "latency=3MB"],
            "latency is '3MB', expected seconds as a number, or a text such",
        ),
        (["cli_models:factory", "--budget", "sise=3MB"], "did you mean 'size'?"),
        (["cli_models:factory", "--budget", "3MB"], "budget has '3MB', expected field=value"),
        (["cli_models:factory", "--budget", "size=3MB"], "measuring on calibration data, and there is none"),
        (["cli_models:factory", "--target", "null", "--draft", ""], "draft names nothing that drafts"),
        (["cli_models:factory", "--target", "null", "--draft", "ngrams"], "did you mean 'ngram'?"),
        (["cli_models:factory", "--target", "null", "--draft", "ngram"], "drafting needs an entry 'decode'"),
    ],
)
def test_compile_errors_leave_nothing_behind(models, capsys, arguments, message):
    err = failure(capsys, "compile", *arguments, "-o", "out")

    assert message in err
    assert err.startswith("error: ")
    assert sorted(p.name for p in models.iterdir() if p.name != "__pycache__") == ["cli_models.py"]


def test_output_is_refused_before_the_work(models, capsys):
    (models / "mine").mkdir()
    (models / "mine" / "diary.txt").write_text("")

    assert "not empty and not an artefact: it has 'diary.txt'" in failure(
        capsys, "compile", "cli_models:slow", "-o", "mine"
    )
    assert "cannot write to" in failure(capsys, "compile", "cli_models:slow", "-o", "/dev/null/out")


def heed_interrupts():
    """A test run in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_gives_130_and_no_output(models):
    command = [sys.executable, "-m", "sylvester", "compile", "cli_models:slow", "-o", "out"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert err == "interrupted\n"
    assert not (models / "out").exists()
