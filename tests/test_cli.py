"""The command line: what it prints, its exit codes, its errors."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sylvester.__main__ import main
from sylvester.cli_show import emit
from sylvester.compiler import knobs
from sylvester.compiler.manifest import DraftSpec, read
from tests import artefacts
from tests.test_compiled import LETTERS

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


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = artefacts.write(tmp_path_factory.mktemp("artefact") / "lm")
    LETTERS.save(str(folder / "tokenizer.json"))
    read(folder).seal(folder)
    return str(folder)


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return tmp_path


def run_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments, code=1):
    assert main(arguments) == code
    return capsys.readouterr().err


def test_generate_streams_the_prompt_and_its_continuation(lm, capsys):
    assert main(["generate", lm, "bb"]) == 0

    assert capsys.readouterr().out == "bb" + LETTERS.decode([4, 6]) + "\n"


def test_generate_json(lm, capsys):
    found = run_json(capsys, "generate", lm, "ca", "--max-new-tokens", "2")

    assert found["text"] == LETTERS.decode([4, 7])


def test_sampling_options_reach_generate(lm, capsys):
    options = ["generate", lm, "ca", "--temperature", "5", "--seed", "4", "--max-new-tokens", "10"]

    assert run_json(capsys, *options)["text"] == run_json(capsys, *options)["text"]
    assert "top_p is 2.0" in failure(capsys, *options, "--top-p", "2")
    assert "repetition_penalty is 0.0" in failure(capsys, *options, "--repetition-penalty", "0")


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """The same model, drafting with n-grams."""
    generation = dataclasses.replace(artefacts.MANIFEST.generation, steady=True, draft=DraftSpec(ngram=True))
    manifest = dataclasses.replace(artefacts.MANIFEST, generation=generation)
    folder = artefacts.write(tmp_path_factory.mktemp("artefact") / "drafting", manifest=manifest)
    LETTERS.save(str(folder / "tokenizer.json"))
    read(folder).seal(folder)
    return str(folder)


def test_generate_drafts_as_compiled_or_as_told(drafting, capsys):
    found = {way: run_json(capsys, "generate", drafting, "ab", "--draft", way) for way in ("compiled", "ngram", "none")}
    default = run_json(capsys, "generate", drafting, "ab")

    assert len({answer["text"] for answer in (default, *found.values())}) == 1
    assert default["text"]
    for answer in (default, found["compiled"], found["ngram"]):
        assert answer["drafting"]["made"] >= answer["drafting"]["rounds"] > 0
    assert found["none"]["drafting"] == {"rounds": 0, "made": 0, "drafted": 0, "accepted": 0}


def test_generate_drafts_only_where_drafts_can_be_verified(lm, capsys):
    assert "cannot verify drafts" in failure(capsys, "generate", lm, "bb", "--draft", "ngram")
    assert "'compiled', 'ngram', 'none'" in failure(capsys, "generate", lm, "bb", "--draft", "w4a8", code=2)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json"])
def test_run_reads_every_kind_of_input(lm, tmp_path, capsys, suffix):
    path, output = tmp_path / f"x{suffix}", tmp_path / "y.npz"
    ids = np.array([[3, 1]])
    if suffix == ".json":
        path.write_text(json.dumps({"input_ids": ids.tolist()}))
    elif suffix == ".npz":
        np.savez(path, input_ids=ids)
    else:
        np.save(path, ids)

    found = run_json(capsys, "run", lm, "--input", str(path), "-o", str(output))

    assert found["outputs"][0]["shape"] == [1, 2, artefacts.VOCAB]
    with np.load(output) as result:
        assert result["logits"].argmax(-1).tolist() == [[6, 4]]


def test_run_prints_a_table(lm, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.array([[3, 1]]))

    assert main(["run", lm, "-i", str(tmp_path / "x.npy")]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "dtype", "shape", "min", "max", "mean"]
    assert row.split()[:2] == ["logits", "float32"]


def test_run_refuses_what_it_cannot_read(lm, tmp_path, capsys):
    good, text, broken, bare = tmp_path / "x.npy", tmp_path / "x.txt", tmp_path / "y.npz", tmp_path / "z.json"
    np.save(good, np.array([[3, 1]], np.int32))
    for path in (text, broken):
        path.write_text("no array")
    bare.write_text("[1]")

    assert "has dtype int32, expected int64" in failure(capsys, "run", lm, "-i", str(good))
    assert "ends in .npy, .npz or .json" in failure(capsys, "run", lm, "-i", str(text))
    assert "cannot read" in failure(capsys, "run", lm, "-i", str(broken))
    assert 'write {"input name": nested lists}' in failure(capsys, "run", lm, "-i", str(bare))
    assert "one input too many" in failure(capsys, "run", lm, "-i", str(good), "-i", str(good))


def test_bench_reports_every_entry(lm, capsys):
    rows = run_json(capsys, "bench", lm, "--runs", "3", "--length", "8")["entries"]

    assert [row["entry"] for row in rows] == ["prefill", "decode"]
    assert all(row["best ms"] <= row["median ms"] for row in rows)
    assert rows[0]["per second"] == pytest.approx(8e3 / rows[0]["median ms"])


def test_bench_counts_the_tokens_that_fit(lm, capsys):
    prefill, _ = run_json(capsys, "bench", lm, "--runs", "3", "--length", "1000000", "--batch", "2")["entries"]
    longest = read(Path(lm)).generation.max_length

    assert prefill["per second"] == pytest.approx(2e3 * longest / prefill["median ms"])


def test_nothing_to_tune_is_said(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "tuning.json").write_text(json.dumps({"problems": {"forward": []}}))

    assert "runs no kernel that can be tuned" in failure(capsys, "tune", str(tmp_path))


def test_json_has_no_nan(capsys):
    emit({"rows": [{"max": math.inf, "mean": math.nan, "min": 1.0}]}, "", as_json=True)

    assert json.loads(capsys.readouterr().out) == {"rows": [{"max": None, "mean": None, "min": 1.0}]}


def test_show_lists_entries_and_files(lm, capsys):
    assert main(["show", lm]) == 0

    out = capsys.readouterr().out
    assert "prefill(input_ids: int64['s0', 's1']) -> (logits: float32['s0', 's1', 8])" in out
    assert "code/avx2.so" in out


def test_doctor_finds_the_toolchain(capsys):
    found = run_json(capsys, "doctor")

    assert found["compiler"]
    assert found["problems"] == []
    assert set(found["kept"]) == {"code", "models"}
    assert set(found["switches"]) == {knob.name for knob in knobs.KNOBS}


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv(knobs.CC.name, "no-such-compiler")

    assert main(["doctor"]) == 1
    assert "no such compiler: 'no-such-compiler'" in capsys.readouterr().out


def test_passes_are_listed(capsys):
    rows = {row["pass"]: row for row in run_json(capsys, "passes")}

    assert rows["canonicalize"]["contract"] == "exact"
    assert all(row["does"] for row in rows.values())


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
        (["cli_models:factory", "--target", "cup"], "did you mean 'cpu'?"),
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


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["compile"], ["compile", "x"], ["bench", "x", "--runs", "many"], ["bench", "x", "--runs", "0"]],
)
def test_usage_errors_give_2(capsys, arguments):
    assert "Usage:" in failure(capsys, *arguments, code=2)


@pytest.mark.parametrize("command", [["generate", "a"], ["bench"], ["show"], ["run", "-i", "x.npy"]])
def test_foreign_folders_are_refused(tmp_path, capsys, command):
    name, *rest = command

    err = failure(capsys, name, str(tmp_path), *rest)

    assert "it has no manifest.json" in err or "no config.json" in err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


def test_missing_extra_names_the_pip_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)

    assert "pip install 'sylvester[cli]'" in failure(capsys, "doctor")


def test_commands_on_an_artefact_do_not_load_torch(lm, tmp_path):
    np.save(tmp_path / "x.npy", np.array([[3, 1]]))
    script = (
        "import sys; from sylvester.__main__ import main\n"
        f"codes = [main(['generate', {lm!r}, 'ca']), main(['bench', {lm!r}, '--runs', '2']), main(['show', {lm!r}]),\n"
        f"         main(['run', {lm!r}, '-i', {str(tmp_path / 'x.npy')!r}])]\n"
        "assert codes == [0] * 4, codes\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


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


def test_reader_that_goes_away_is_no_crash(lm):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "sylvester", "generate", lm, "ca"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_text_is_utf8_even_when_streamed_to_a_pipe(lm, tmp_path):
    start = time.perf_counter()
    words = Path(shutil.copytree(lm, tmp_path / "lm"))
    command = [sys.executable, "-m", "sylvester", "generate", str(words), "b", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, check=True)

    assert done.stdout.decode("utf-8").startswith("b")
    assert time.perf_counter() - start < 30
