"""Mistakes of a user end in an error that says what was found, what was expected, where, and what to do."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

import sylvester as sv
from sylvester.__main__ import main
from sylvester.compiler import artefact, knobs
from sylvester.compiler.errors import ArtefactError, CompileError, InputError, ToolchainMissing, TraceError
from tests import artefacts

MODELS = """
import torch
from torch import nn

class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1

def branch():
    return Branch(), (torch.ones(3, 4),)

def linear():
    return nn.Linear(4, 5).eval(), (torch.ones(3, 4),)

def never():
    raise AssertionError("the output folder comes first")
"""


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """Takes input_ids int64 [s0 <= 64, s1 <= 16]; has no tokenizer."""
    return artefacts.write(tmp_path_factory.mktemp("artefact") / "lm")


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "bad_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def fails(capsys, *arguments):
    """What a command that gives 1 prints."""
    assert main(list(arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


def whole(error):
    return "\n".join([str(error.value), *error.value.__notes__])


class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class Repeat(nn.Module):
    def forward(self, x):
        for _ in range(int(x.max())):
            x = x * 2
        return x


class Cut(nn.Module):
    def forward(self, x):
        return x[: int(x.sum().item())]


class Positive(nn.Module):
    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize(
    ("model", "found", "where", "way_out"),
    [
        (Branch(), "control flow or a size depends on the values", "x.sum() > 0", "choose with torch.where"),
        (Repeat(), "control flow or a size depends on the values", "range(int(x.max()))", "out of the model"),
        (Cut(), "control flow or a size depends on the values", "x.sum().item()", "out of the model"),
        (Positive(), "a size of %index depends on the values", "x[x > 0]", "mark them with torch.where"),
    ],
)
def test_data_dependent_control_flow(model, found, where, way_out):
    with pytest.raises(TraceError, match=found) as error:
        sv.compile(model, (torch.ones(3, 4),), target="null")

    assert where in whole(error)
    assert f"hint: {error.value.hint}" in whole(error)
    assert way_out in error.value.hint


def test_data_dependent_control_flow_on_the_command_line(models, capsys):
    err = fails(capsys, "compile", "bad_models:branch", "--target", "null", "-o", "out")

    assert err.startswith("error: control flow or a size depends on the values of a tensor\n")
    assert "hint: compute both sides and choose with torch.where" in err
    assert "bad_models.py:7 in forward: return x + 1 if x.sum() > 0 else x - 1" in err


def test_text_without_a_tokenizer(lm, capsys):
    with sv.load(lm) as compiled, pytest.raises(ArtefactError) as error:
        compiled.generate("once")

    message = f"no tokenizer.json in {str(lm)!r}: text cannot be encoded"
    hint = "compile a model folder that has one, or give token ids"
    assert (error.value.message, error.value.hint) == (message, hint)
    assert fails(capsys, "generate", str(lm), "once") == f"error: {message}\nhint: {hint}\n"


def zeros(*shape, dtype=np.int64):
    return np.zeros(shape, dtype)


CALLS = {
    "rank": (zeros(3), "input 'input_ids' has shape [3], expected [s0, s1]", "it has 1 dimensions, give 2"),
    "dtype": (
        zeros(1, 3, dtype=np.float32),
        "input 'input_ids' has dtype float32, expected int64",
        "`.to(torch.int64)`",
    ),
    "no rows": (zeros(0, 3), "'input_ids' has 0 in dimension 0, below the compiled minimum of 1", "give more"),
    "long": (
        zeros(1, 17),
        "'input_ids' has 17 in dimension 1, above the compiled maximum of 16",
        "compile with a larger maximum length",
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_inputs_that_do_not_fit(lm, name, convert):
    array, message, hint = CALLS[name]

    with sv.load(lm) as compiled, pytest.raises(InputError) as error:
        compiled(convert(array))

    assert error.value.message == message
    assert hint in error.value.hint


@pytest.mark.parametrize("name", CALLS)
def test_inputs_that_do_not_fit_on_the_command_line(lm, name, tmp_path, capsys):
    array, message, hint = CALLS[name]
    np.save(tmp_path / "x.npy", array)

    err = fails(capsys, "run", str(lm), "-i", str(tmp_path / "x.npy"))

    assert err.startswith(f"error: {message}\nhint: ")
    assert hint in err


def test_a_fixed_size_that_is_another():
    compiled = sv.compile(nn.Linear(6, 5).eval(), (torch.ones(3, 6),), target="reference")

    with compiled, pytest.raises(InputError, match=r"'input' has shape \[3, 7\], expected \[3, 6\]") as error:
        compiled(torch.ones(3, 7))

    assert "numbers are fixed" in error.value.hint


def test_a_prompt_above_the_compiled_maximum(lm):
    with sv.load(lm) as compiled, pytest.raises(InputError) as error:
        compiled.generate(zeros(1, 17))

    assert error.value.message == "the prompt has 17 tokens, above the compiled maximum of 16"
    assert error.value.hint


def test_no_c_compiler(models, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(knobs.CC.name, "")
    monkeypatch.setattr("sylvester.backends.toolchain.find_spec", lambda name: None)

    with pytest.raises(ToolchainMissing) as error:
        sv.compile(nn.Linear(4, 5).eval(), (torch.ones(3, 4),))

    assert error.value.message == "no C compiler: looked for ziglang, clang and gcc"
    assert error.value.hint == "pip install ziglang"
    err = fails(capsys, "compile", "bad_models:linear", "-o", "out")
    assert err == "error: no C compiler: looked for ziglang, clang and gcc\nhint: pip install ziglang\n"
    assert not (models / "out").exists()


def test_an_unwritable_output_folder_is_refused_before_the_model_is_made(models, monkeypatch, capsys):
    monkeypatch.setattr(artefact.os, "access", lambda path, mode: False)

    err = fails(capsys, "compile", "bad_models:never", "-o", "out")

    assert err == f"error: cannot write to {os.getcwd()!r}\nhint: choose an output folder you may write to\n"


def test_an_output_file_that_cannot_be_written(lm, tmp_path, capsys):
    np.save(tmp_path / "x.npy", zeros(1, 3))

    err = fails(capsys, "run", str(lm), "-i", str(tmp_path / "x.npy"), "-o", str(tmp_path / "none" / "y.npz"))

    assert err.startswith("error: ")
    assert "none" in err


def test_errors_are_one_family():
    assert all(issubclass(kind, CompileError) for kind in (ArtefactError, InputError, ToolchainMissing, TraceError))
