"""The command line: what it prints, its exit codes, its errors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sylvester.__main__ import main
from sylvester.cli_show import emit
from sylvester.compiler import knobs
from sylvester.compiler.manifest import DraftSpec, read
from tests import artefacts
from tests.test_compiled import LETTERS


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = artefacts.write(tmp_path_factory.mktemp("artefact") / "lm")
    LETTERS.save(str(folder / "tokenizer.json"))
    read(folder).seal(folder)
    return str(folder)


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
        assert answer["drafting"]["tokens_per_call"] >= 1 >= answer["drafting"]["acceptance"] >= 0
    assert not any(found["none"]["drafting"].values())


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
