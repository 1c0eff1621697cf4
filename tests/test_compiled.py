"""Compiled: calls, generation, text, saving; on the hand-written artefact."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import sylvester as sv
from sylvester.compiler import text
from sylvester.compiler.errors import ArtefactError, CompileError, InputError, Unsupported
from sylvester.compiler.manifest import read
from sylvester.compiler.outputs import Outputs, package
from sylvester.compiler.sampling import Sampling
from tests import artefacts


def byte_tokenizer(words):
    """Token i is words[i]; text is written in the byte alphabet, so a token may be half a character."""
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


HALF = "Ã", "©"  # the two bytes of é in the byte alphabet
LETTERS = byte_tokenizer(["<end>", "a", "b", "c", *HALF, "d", "e"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "lm"
    artefacts.write(folder)
    LETTERS.save(str(folder / "tokenizer.json"))
    read(folder).seal(folder)
    return folder


@pytest.fixture
def lm(folder):
    with sv.load(folder) as lm:
        yield lm


def ids(*rows):
    return np.array(rows, np.int64)


def test_numpy_in_numpy_out(lm):
    out = lm(ids([3, 1]))

    assert isinstance(out, Outputs)
    assert isinstance(out.logits, np.ndarray)
    assert out.logits is out["logits"] is out[0]
    assert out.logits.argmax(-1).tolist() == [[6, 4]]


def test_torch_in_torch_out(lm):
    out = lm(input_ids=torch.tensor([[3, 1]]))

    assert isinstance(out.logits, torch.Tensor)
    assert out.logits.argmax(-1).tolist() == [[6, 4]]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (([[3, 1]],), {}, "'input_ids' is a list, expected a tensor or a numpy array"),
        ((ids([1]), ids([1])), {}, "2 positional inputs given, expected at most 1"),
        ((ids([1]),), {"input_ids": ids([1])}, "given twice"),
        ((), {"x": ids([1])}, "unexpected input 'x'"),
        ((torch.tensor([[1]], dtype=torch.int32),), {}, "dtype int32, expected int64"),
        ((torch.zeros(1, 1, device="meta"),), {}, "is on meta, expected the CPU"),
    ],
)
def test_bad_calls_are_refused(lm, args, kwargs, message):
    with pytest.raises(InputError) as error:
        lm(*args, **kwargs)

    assert message in error.value.message


def test_package_follows_the_model():
    assert package("tensor", {"y": 1}) == 1
    assert package("tuple", {"a": 1, "b": 2}) == (1, 2)
    assert package("dict", {"a": 1, "b": 2})[1:] == (2,)
    with pytest.raises(CompileError, match="unknown output type 'list'"):
        package("list", {"a": 1})
    with pytest.raises(AttributeError, match="no output 'b', there are"):
        _ = package("dict", {"a": 1}).b


def test_greedy_generation(lm):
    assert lm.generate(ids([3, 1]), max_new_tokens=3).tolist() == [[3, 1, 4, 7, 2]]
    assert lm.generate(torch.tensor([[3, 1]]), max_new_tokens=1).tolist() == [[3, 1, 4]]
    assert lm.generate(ids([3, 1]), max_new_tokens=0).tolist() == [[3, 1]]


def test_generation_stops_at_the_end_token(lm):
    assert lm.generate(ids([2, 2])).tolist() == [[2, 2, 4, 6, 0]]


def test_rows_that_stopped_wait_for_the_others(lm):
    found = lm.generate(ids([2, 4], [3, 4]), max_new_tokens=4)

    assert found.tolist() == [[2, 4, 6, 0, 0, 0], [3, 4, 7, 2, 5, 0]]


def test_stop_ids_can_be_replaced(lm):
    assert lm.generate(ids([2, 2]), stop=(6,)).tolist() == [[2, 2, 4, 6]]


def test_generation_goes_up_to_the_compiled_maximum(lm):
    assert lm.generate(ids([3, 1]), stop=()).shape == (1, artefacts.CAPACITY)


def test_streaming_gives_the_same_ids(lm):
    stream = lm.generate(ids([3, 1]), max_new_tokens=3, stream=True)

    assert next(stream) == 4
    assert list(stream) == [7, 2]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (ids([1] * 17), {}, "the prompt has 17 tokens, above the compiled maximum of 16"),
        (
            ids([1] * 10),
            {"max_new_tokens": 7},
            "10 prompt tokens + 7 new tokens = 17, above the compiled maximum of 16",
        ),
        (ids([1] * 10), {"max_new_tokens": 7, "stream": True}, "above the compiled maximum of 16"),
        (np.empty((1, 0), np.int64), {}, "the prompt has no tokens"),
        (np.array([1]), {}, "shape [1], expected [batch, length]"),
        (ids([1], [2]), {"stream": True}, "streaming takes one prompt, found a batch of 2"),
        (ids([1]), {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (ids([1]), {"temperature": -1.0}, "temperature is -1.0"),
        (ids([1]), {"top_k": 0}, "top_k is 0"),
        (ids([1]), {"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_generation_is_refused(lm, prompt, options, message):
    with pytest.raises(InputError) as error:
        lm.generate(prompt, **options)

    assert message in error.value.message


def test_sampling_repeats_with_its_seed(lm):
    one, two, other = (lm.generate(ids([3, 1]), 10, temperature=9.0, seed=s, stop=()).tolist() for s in (1, 1, 2))

    assert one == two != other


def test_sampled_frequencies_follow_the_logits():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    random = np.random.default_rng(0)

    drawn = Sampling(temperature=1.0).pick(np.repeat(logits, 4000, 0), random)

    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.1), [1, 0, 0, 0]),
        (Sampling(0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
    ],
)
def test_sampling_probabilities(sampling, expected):
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))

    np.testing.assert_allclose(sampling.probabilities(logits)[0], expected, atol=1e-9)


def test_text_in_text_out(lm):
    assert lm.encode("ca") == [3, 1]
    assert lm.decode([3, 1, 0]) == "ca<end>"
    assert lm.generate("ca", max_new_tokens=1, stop=()) == LETTERS.decode([4])
    assert lm.generate("bb") == LETTERS.decode([4, 6])


def test_streamed_text_never_breaks_a_character():
    pieces = list(text.pieces(LETTERS, [1, 4, 5, 2, 4, 5]))

    assert pieces == ["a", "é", "b", "é"]


@pytest.mark.parametrize("seed", range(5))
def test_streamed_text_is_the_decoded_text(seed):
    tokens = np.random.default_rng(seed).integers(1, 8, 60).tolist()

    assert "".join(text.pieces(LETTERS, tokens)) == LETTERS.decode(tokens)


def test_missing_tokenizer_is_an_error_with_a_way_out(folder, tmp_path):
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    read(bare).seal(bare)

    with sv.load(bare) as lm, pytest.raises(ArtefactError, match=r"no tokenizer\.json") as error:
        lm.generate("ca")

    assert "give token ids" in error.value.hint


def test_missing_tokenizers_package_names_the_pip_line(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    with pytest.raises(CompileError, match=r"needs the package `tokenizers`") as error:
        lm.encode("ca")

    assert error.value.hint == "pip install tokenizers"


def test_broken_tokenizer_is_refused(folder, tmp_path):
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    (bad / "tokenizer.json").write_text("{}")
    read(bad).seal(bad)

    with sv.load(bad) as lm, pytest.raises(ArtefactError, match=r"tokenizer.json is not a tokenizer"):
        lm.encode("ca")


def test_artefact_without_decode_cannot_generate(folder, tmp_path):
    encoder = Path(shutil.copytree(folder, tmp_path / "encoder"))
    manifest = artefacts.MANIFEST
    type(manifest)("cpu", {"prefill": manifest.entries["prefill"]}, isas=("scalar",), state=manifest.state).seal(
        encoder
    )

    with sv.load(encoder) as lm, pytest.raises(Unsupported, match=r"cannot generate: it has the entries \['prefill'\]"):
        lm.generate(ids([1]))


def test_save_load_and_replace(lm, tmp_path):
    out = lm.save(tmp_path / "new" / "out")
    lm.save(out)

    with sv.load(out) as again:
        assert again.generate(ids([3, 1]), max_new_tokens=3).tolist() == [[3, 1, 4, 7, 2]]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_save_refuses_other_peoples_folders(lm, tmp_path):
    (tmp_path / "thesis.tex").write_text("")

    with pytest.raises(CompileError, match=r"not empty and not an artefact: it has 'thesis.tex'"):
        lm.save(tmp_path)
    with pytest.raises(CompileError, match="is a file, expected a folder"):
        lm.save(tmp_path / "thesis.tex")


def test_save_refuses_an_unwritable_place(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    with pytest.raises(CompileError, match="cannot write to") as error:
        lm.save(tmp_path / "out")

    assert error.value.hint == "choose an output folder you may write to"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_save_refuses_a_read_only_folder(lm, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)

    with pytest.raises(CompileError, match="cannot write to"):
        lm.save(tmp_path / "out")


def test_a_write_that_fails_leaves_the_old_artefact(lm, tmp_path, monkeypatch):
    out = lm.save(tmp_path / "out")

    def full(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(CompileError, match="no space left on device"):
        lm.save(out)

    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sv.load(out).entries == ("prefill", "decode")


def test_loading_twice_the_bytes_is_refused_before_code_runs(folder, tmp_path):
    edited = Path(shutil.copytree(folder, tmp_path / "edited"))
    with (edited / "code" / "scalar.so").open("ab") as file:
        file.write(b"\0")

    with pytest.raises(ArtefactError, match=r"code/scalar.so in .* is edited"):
        sv.load(edited)
