"""examples/finetune_halo.py on a small model: losses, curves, folders, and going on after a stop."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
import transformers as hf

from tests import docs_setting
from tests.docs_pages import ROOT

RUNS = ("fp32", "level2")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_halo", ROOT / "examples/finetune_halo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, tmp_path, monkeypatch):
    docs_setting.write_stand_in(tmp_path / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(example, "WINDOW", 32)
    monkeypatch.setattr(example, "MEASURE_EVERY", 2)

    def call(*words: str) -> dict[str, list[list[float]]]:
        given = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--steps", "6", "--rate", "1e-2")
        monkeypatch.setattr(sys, "argv", ["finetune_halo.py", *given, *words])
        example.main()
        return json.loads((tmp_path / "out/losses.json").read_text())

    return call


def test_losses_fall_alike_and_a_stop_loses_nothing(run, example, monkeypatch, tmp_path, capsys):
    kept = example.keep

    def stopped(found, folder):
        kept(found, folder)
        if found.losses[-1][0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(example, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("--runs", *RUNS)
    monkeypatch.setattr(example, "keep", kept)
    whole = run("--runs", *RUNS)
    for losses in whole.values():
        assert [step for step, _ in losses] == [0, 2, 4, 6]
        assert losses[-1][1] < losses[0][1]
    assert whole["level2"][-1][1] == pytest.approx(whole["fp32"][-1][1], rel=0.01)
    assert "HALO-2 in int8: 14 linear layers" in capsys.readouterr().out
    assert (tmp_path / "out/loss.svg").read_text().startswith("<svg")
    ids = torch.randint(4096, (1, 5))
    parts = (tmp_path / "model", tmp_path / "out/level2")
    first, last = (hf.AutoModelForCausalLM.from_pretrained(part)(ids).logits for part in parts)
    assert not torch.equal(first, last)
    with pytest.raises(SystemExit, match="is of another run"):
        run("--steps", "7")


def test_outliers_do_not_change_what_the_model_computes(example, tmp_path):
    docs_setting.write_stand_in(tmp_path / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(4096, (2, 9))
    before = model(ids).logits
    example.inject(model, 30.0)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("words", "told"), [(("--steps", "0"), "at least 1"), (("--text", "no.txt"), "is no file")])
def test_wrong_options_are_named(run, words, told, capsys):
    with pytest.raises(SystemExit):
        run(*words)
    assert told in capsys.readouterr().err
