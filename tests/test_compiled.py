"""Compiled: calls, generation, text, saving; on the hand-written artefact."""

from __future__ import annotations

import math
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


def test_one_stop_id_needs_no_tuple(lm):
    assert lm.generate(ids([2, 2]), stop=6).tolist() == [[2, 2, 4, 6]]
    assert lm.generate(ids([2, 2]), stop=np.array([6])).tolist() == [[2, 2, 4, 6]]


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
        (np.array([[1.0]]), {}, "the prompt has dtype float64, expected integers"),
        (ids([1, 8]), {}, "token id 8 at position 1 of row 0 of the prompt, expected 0 to 7"),
        (ids([1, 2], [3, -1]), {}, "token id -1 at position 1 of row 1 of the prompt, expected 0 to 7"),
        (17, {}, "is a int, expected a tensor or a numpy array"),
        ([], {}, "the list of prompts is empty"),
        ([[1], []], {}, "the prompt has no tokens"),
        ([1, 2], {}, "prompt 0 is a int, expected token ids"),
        (["a", [1]], {}, "prompt 0 is a str, expected token ids"),
        ([[1], [[2]]], {}, "prompt 1 has shape [1, 1], expected [length]"),
        ([[[2, 1], [1]]], {}, "prompt 0 is a list of lists of different lengths"),
        ([[1.5]], {}, "prompt 0 has dtype float64, expected integers"),
        ([[1]], {"stream": True}, "streaming takes a text or ids [batch, length], found a list"),
        (ids([1]), {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (ids([1]), {"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        (ids([1]), {"temperature": -1.0}, "temperature is -1.0"),
        (ids([1]), {"temperature": "hot"}, "temperature is 'hot', expected 0 (greedy) or more"),
        (ids([1]), {"temperature": float("nan")}, "temperature is nan"),
        (ids([1]), {"temperature": True}, "temperature is True"),
        (ids([1]), {"top_k": 0}, "top_k is 0"),
        (ids([1]), {"top_k": 2.5}, "top_k is 2.5, expected a whole number, 1 or more, or None"),
        (ids([1]), {"top_p": 1.5}, "top_p is 1.5"),
        (ids([1]), {"top_p": 0}, "top_p is 0, expected more than 0 and at most 1, or None"),
        (ids([1]), {"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected more than 0"),
        (ids([1]), {"repetition_penalty": None}, "repetition_penalty is None"),
        (ids([1]), {"seed": -1}, "seed is -1, expected a whole number, 0 or more, or None"),
        (ids([1]), {"seed": "a"}, "seed is 'a'"),
        (ids([1]), {"chunk": -2}, "chunk is -2"),
        (ids([1]), {"reuse": "yes"}, "reuse is 'yes', expected True, False or None"),
        (ids([1]), {"stop": (1.5,)}, "stop has 1.5, expected token ids"),
        (ids([1]), {"stop": 1.5}, "stop is a float, expected token ids"),
        (ids([1]), {"stop": "a"}, "stop has the text 'a', but the prompt is token ids"),
        ("ca", {"stop": ("",)}, "stop has '', expected token ids"),
    ],
)
def test_bad_generation_is_refused(lm, prompt, options, message):
    with pytest.raises(InputError) as error:
        lm.generate(prompt, **options)

    assert message in error.value.message


def test_batches_stream_arrays(lm):
    steps = list(lm.generate(ids([2, 4], [3, 4]), max_new_tokens=4, stream=True))

    assert np.stack(steps, 1).tolist() == [[6, 0, 0, 0], [7, 2, 5, 0]]


def test_prompts_of_different_lengths(lm):
    rows = [[2, 4], [3], [3, 4]]
    expected = [[2, 4, 6, 0], [3, 6, 1, 4, 7], [3, 4, 7, 2, 5, 0]]

    assert lm.generate(rows, max_new_tokens=4) == expected
    found = lm.generate([np.array(row, np.int32) for row in rows], max_new_tokens=4)
    assert [row.tolist() for row in found] == expected
    assert all(row.dtype == np.int64 for row in found)


@pytest.mark.parametrize(("score", "text"), [(math.nan, "nan"), (-math.inf, "-inf"), (math.inf, "inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(lm, monkeypatch, score, text, temperature):
    run = lm._runner.run

    def broken(entry, *rest):
        outputs = run(entry, *rest)
        if entry == "decode":
            outputs["logits"][1] = score
        return outputs

    monkeypatch.setattr(lm._runner, "run", broken)
    with pytest.raises(InputError) as error:
        lm.generate(ids([3, 1], [3, 2]), 3, temperature=temperature, seed=1)

    assert error.value.message == f"the best logit of row 1 is {text} after 3 tokens, expected a finite number"
    assert not lm._pool._kept


def test_sampling_repeats_with_its_seed(lm):
    one, two, other = (lm.generate(ids([3, 1]), 10, temperature=9.0, seed=s, stop=()).tolist() for s in (1, 1, 2))

    assert one == two != other


def test_text_in_text_out(lm):
    assert lm.encode("ca") == [3, 1]
    assert lm.decode([3, 1, 0]) == "ca<end>"
    assert lm.generate("ca", max_new_tokens=1, stop=()) == LETTERS.decode([4])
    assert lm.generate("bb") == LETTERS.decode([4, 6])


def test_texts_in_texts_out(lm):
    assert lm.generate(["bb", "ca", "b"]) == [lm.generate("bb"), lm.generate("ca"), lm.generate("b")]


@pytest.mark.parametrize(("stop", "end"), [("b", "b"), (("zzz", "eb"), "eb"), (["b", 7], "e"), (("ez",), "<end>")])
def test_texts_end_a_text(lm, stop, end):
    whole = lm.generate("ca", max_new_tokens=6, stop=())

    found = lm.generate("ca", max_new_tokens=6, stop=stop)

    assert found == whole[: whole.index(end)]
    assert "".join(lm.generate("ca", max_new_tokens=6, stop=stop, stream=True)) == found
    assert lm.generate(["ca", "ca"], max_new_tokens=6, stop=stop) == [found, found]


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [(("bab",), "abaa"), (("zz", "baa"), "a"), (("a",), ""), (("aab", "ab"), ""), (("zz",), None)],
)
def test_text_until_a_stop(size, stops, expected):
    given = "abaababaab"
    expected = given if expected is None else expected

    assert "".join(text.until([given[n : n + size] for n in range(0, 10, size)], stops)) == expected


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
