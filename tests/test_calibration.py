"""What `compile(calibration=...)` takes: what samples it becomes, and what it says of data that does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import sylvester as sv
from sylvester.cli_inputs import read_calibration
from sylvester.compiler import compile_cache, knobs
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.errors import CompileError
from sylvester.compiler.samples import listed, parse
from sylvester.passes import QuantizeCache
from tests import zoo
from tests.programs import bigram, program

VOCABULARY = 40
WORDS = [f"w{i}" for i in range(VOCABULARY)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def lm(tokenizer):
    made = bigram(torch.zeros(VOCABULARY, VOCABULARY))
    made.info |= {"tokenizer": str(tokenizer), "max_length": 700}
    return made


def words(count, start=0):
    return " ".join(WORDS[(start + i) % VOCABULARY] for i in range(count))


def ids(count, start=0):
    return (torch.arange(count) + start) % VOCABULARY


def shapes(samples):
    return [list(sample["x0"].shape) for sample in samples]


def linear():
    return program(lambda x, w: x @ w, torch.randn(3, 4), weights={"w": torch.randn(4, 5)})


def error_of(made, given):
    with pytest.raises(CompileError) as error:
        parse(made, listed(given))
    return error.value


def test_texts_are_joined_and_cut_into_windows(lm):
    found = parse(lm, [words(1000), words(1300, start=1000)])

    whole = torch.cat([s["x0"] for s in (*found.fit, *found.held)], 1)
    assert torch.equal(whole[0], ids(2300))
    assert shapes(found.fit) == [[1, 512]] * 4
    assert shapes(found.held) == [[1, 252]]


@pytest.mark.parametrize(
    ("count", "expected"), [(900, [225] * 4), (130, [64, 64, 2]), (129, [64, 64]), (2, [2])], ids=str
)
def test_few_texts_make_short_windows(lm, count, expected):
    found = parse(lm, [words(count)])

    assert shapes((*found.fit, *found.held)) == [[1, n] for n in expected]


def test_windows_are_no_longer_than_the_model_allows(lm):
    lm.info["max_length"] = 100

    assert shapes(parse(lm, [words(1000)]).fit)[0] == [1, 100]


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (101, 25)])
def test_the_last_quarter_is_held_back(lm, count, held):
    given = [ids(3, start=i) for i in range(count)]

    found = parse(lm, given)

    assert len(found.held) == held
    assert [int(s["x0"][0, 0]) for s in (*found.fit, *found.held)] == [i % VOCABULARY for i in range(count)]


@pytest.mark.parametrize(
    "given",
    [ids(6), ids(6)[None], ids(6).int(), ids(6).numpy(), ids(6).numpy().astype(np.uint16), ids(6).tolist(),
     (ids(6)[None],), {"x0": ids(6)[None]}, {"x0": ids(6)[None].numpy()}],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)  # fmt: skip
def test_ids_come_in_many_forms(lm, given):
    (sample,) = parse(lm, [given]).fit

    assert torch.equal(sample["x0"], ids(6)[None])
    assert sample["x0"].dtype == torch.int64


def test_rows_of_a_batch_are_samples_of_a_language_model(lm):
    found = parse(lm, [torch.stack([ids(5), ids(5, 1)]), words(2), ids(600), ids(3)])

    assert shapes((*found.fit, *found.held)) == [[1, 5], [1, 5], [1, 2], *[[1, 150]] * 4, [1, 3]]


def test_any_iterable_is_read_once(lm):
    given = listed(ids(4, i) for i in range(8))

    assert len(parse(lm, given).held) == 2


def test_parts_of_the_callers_choice_are_kept(lm):
    given = Calibration(({"x0": ids(4)[None]},), tuple({"x0": ids(4, i)[None]} for i in range(3)))

    found = parse(lm, listed(given))

    assert (len(found.fit), len(found.held)) == (1, 3)


def test_texts_of_an_encoder_are_samples_with_masks(tokenizer):
    case = zoo.case("bert")
    made = sv.trace(case.model, case.inputs)
    made.info["tokenizer"] = str(tokenizer)

    found = parse(made, [words(3), words(5), words(500), torch.arange(4)])

    first, second, long, last = (*found.fit, *found.held)
    assert torch.equal(second["input_ids"], ids(5)[None])
    assert torch.equal(second["attention_mask"], torch.ones(1, 5, dtype=torch.int64))
    assert long["input_ids"].shape == (1, made.info["max_length"])
    assert torch.equal(last["input_ids"], torch.arange(4)[None])
    assert set(first) == set(case.inputs)


def test_inputs_of_other_models(lm):
    made = linear()

    found = parse(made, [torch.ones(2, 4), (torch.ones(1, 4),), {"x0": torch.ones(7, 4)}, np.ones((2, 4), np.float32)])

    assert shapes((*found.fit, *found.held)) == [[2, 4], [1, 4], [7, 4], [2, 4]]


def test_windows_fill_the_batches_of_a_fixed_size():
    made = program(torch.nn.functional.embedding, torch.zeros((3, 8), dtype=torch.int64),
                   weights={"table": torch.zeros(VOCABULARY, VOCABULARY)}, axes=lambda x: ())  # fmt: skip
    made.info["kind"] = "causal-lm"

    found = parse(made, [ids(800)])

    assert shapes((*found.fit, *found.held)) == [[3, 8]] * 33
    assert "has 20 tokens, one call takes at least 3 x 8" in error_of(made, [ids(20)]).message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "calibration is empty"),
        (Calibration(()), "calibration is empty"),
        (7, "calibration is a int, expected an iterable of samples"),
        ("some text", "calibration is a str, expected an iterable of samples"),
        ({"x0": ids(3)}, "calibration is a dict, expected an iterable of samples"),
        (torch.tensor(3), "calibration is a Tensor of shape [], expected an iterable of samples"),
        (ids(3), "calibration is a Tensor of shape [3], expected an iterable of samples"),
        ([ids(3), 7.5], "calibration sample 1 is a float, expected a text, token ids"),
        ([["a", "b"]], "calibration sample 0 is a list, expected a text, token ids"),
        ([torch.randn(5)], "calibration sample 0 is torch.float32, expected whole numbers: token ids"),
        ([ids(8).reshape(2, 2, 2)], "has shape [2, 2, 2], expected ids [tokens] or [batch, tokens]"),
        ([ids(3), ids(1)], "calibration sample 1 has 1 tokens, one call takes at least 2"),
        ([ids(1)[None]], "calibration sample 0 has one token, expected at least 2"),
        ([words(1)], "calibration sample 0 has 1 tokens"),
        (["", ""], "calibration samples 0 to 1 has 0 tokens"),
        ([ids(701)[None]], "calibration sample 0: input 'x0' has 701 tokens, the model takes at most 700"),
        ([(ids(3)[None], ids(3)[None])], "calibration sample 0 has 2 tensors, the model takes 1: ['x0']"),
        ([{"x1": ids(3)[None]}], "calibration sample 0: unexpected input 'x1', expected ['x0']"),
        ([{}], "calibration sample 0: missing input 'x0'"),
        ([{"x0": ids(3)}], "input 'x0' has shape [3], expected ["),
        ([{"x0": ids(3)[None].int()}], "input 'x0' has dtype int32, expected int64"),
        ([{"x0": [[1, 2]]}], "calibration sample 0: input 'x0' is a list, expected a tensor or a numpy array"),
        ([{"x0": ids(3)[None].to("meta")}], "tensor on meta, expected a dense one on the CPU"),
        ([ids(3), ids(3) + 38], "calibration sample 1: input 'x0' holds the id 40, the model knows 0 to 39"),
        ([ids(3) - 1], "input 'x0' holds the id -1, the model knows 0 to 39"),
    ],
)  # fmt: skip
def test_bad_data_of_a_language_model(lm, given, message):
    assert message in error_of(lm, given).message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(2, 4), torch.tensor([[1, 2, 3, float("nan")]])],
         "calibration sample 1: input 'x0': 1 of 4 values are NaN, expected finite numbers"),
        ([torch.full((1, 4), -torch.inf)], "input 'x0': 4 of 4 values are infinite"),
        ([torch.ones(2, 5)], "calibration sample 0: 'x0' has shape [2, 5], expected [2, 4]"),
        ([torch.ones(2, 4).double()], "input 'x0' has dtype float64, expected float32"),
        (["text"], "calibration sample 0 is text, the model takes no token ids"),
    ],
)  # fmt: skip
def test_bad_data_of_other_models(given, message):
    assert message in error_of(linear(), given).message


def test_text_needs_a_tokenizer(lm, tmp_path):
    for source, message in ((None, "has no tokenizer"), (tmp_path / "tokenizer.json", "no tokenizer.json in")):
        lm.info["tokenizer"] = str(source) if source else None
        assert message in error_of(lm, [words(5)]).message


def test_what_cannot_be_made_from_text_is_said():
    pair = (torch.zeros((2, 3), dtype=torch.int64), torch.randn(2, 4))
    made = program(lambda ids, x, w: (ids + 1, x @ w), *pair, weights={"w": torch.randn(4, 5)})

    error = error_of(made, [ids(4)])

    assert "the model also takes 'x1', which cannot be made from tokens" in error.message
    assert "['x0', 'x1']" in error.hint


def test_several_inputs_need_names():
    made = program(lambda x, y: x + y, torch.randn(3, 4), torch.randn(3, 4))

    assert "calibration sample 0 is a Tensor, expected a tuple of tensors" in error_of(made, [torch.ones(3, 4)]).message


def test_another_tokenizer_is_noticed():
    table = torch.full((VOCABULARY, VOCABULARY), -4.0)
    table[torch.arange(VOCABULARY), (torch.arange(VOCABULARY) + 1) % VOCABULARY] = 4.0
    made = bigram(table)

    assert len(parse(made, [ids(9)]).fit) == 1
    error = error_of(made, [ids(40).flip(0)])

    assert "guessing evenly among 40 tokens gives 40" in error.message
    assert "another tokenizer" in error.hint


def test_a_model_that_gives_no_number_is_noticed():
    made = bigram(torch.full((VOCABULARY, VOCABULARY), torch.nan))

    assert "the perplexity of the model on the calibration data is nan" in error_of(made, [ids(9)]).message


@pytest.fixture(scope="module")
def case():
    """A model that writes, and what it writes: data that it predicts well."""
    found = zoo.case("llama-gqa")
    text = found.inputs["input_ids"][:, :2]
    with torch.no_grad():
        for _ in range(14):
            text = torch.cat([text, found.model(text).logits[:, -1:].argmax(-1)], 1)
    return found, text


def test_compile_measures_on_both_parts(case):
    model, text = case

    data = [*text, *text]
    with sv.compile(model.model, model.inputs, target="null", passes=[QuantizeCache()], calibration=data) as compiled:
        (*_, row) = compiled.report["ledger"]["rows"]
        facts = compiled.report["model"]["calibration"]
        assert "quantize-cache: against float on held-out data: perplexity" in compiled.ledger

    assert facts == {"fit": 3, "held": 1}
    assert [(j["data"], j["samples"], j["quality"]["positions"]) for j in row["quality"]] == [
        ("calibration", 3, 45),
        ("held-out", 1, 15),
    ]


def test_a_program_of_the_caller_is_left_alone():
    made = bigram(torch.zeros(VOCABULARY, VOCABULARY))

    sv.compile(made, target="null", calibration=[ids(9)]).close()

    assert made.calibration is None
    assert made.info["notes"] == []


def test_bad_data_is_refused_before_anything_is_built(case):
    model, _ = case

    with pytest.raises(CompileError, match="calibration is empty"):
        sv.compile(model.model, model.inputs, target="null", calibration=[])


def test_other_data_is_another_artefact(case, monkeypatch, tmp_path):
    monkeypatch.setenv(knobs.REUSE.name, "1")
    monkeypatch.setenv(knobs.CACHE.name, str(tmp_path))
    model, text = case

    class Backend:
        name = "null"

        def identity(self, target):
            return ("null",)

    def key(calibration):
        given = (model.model, model.inputs, None, sv.Target("null"), (), Backend(), calibration)
        return compile_cache.key(*given).text

    data = [None, listed(["a text"]), listed(["another"]), listed([text]), listed([text + 1]), listed([text.numpy()])]
    data.append(Calibration(({"input_ids": text},)))
    assert len({key(given) for given in data} - {""}) == len(data)
    assert key(listed([text])) == key(listed([text.clone()]))


def test_files_hold_a_text_or_ids(tmp_path):
    text, array = tmp_path / "text.txt", np.arange(6).reshape(2, 3)
    text.write_text("é")
    np.save(tmp_path / "ids.npy", array)
    np.save(tmp_path / "images.npy", array.astype(np.float32))
    save_file({"a": array, "b": array[0]}, tmp_path / "ids.safetensors")

    assert read_calibration(text) == ["é"]
    assert [a.tolist() for a in read_calibration(tmp_path / "ids.npy")] == array.tolist()
    assert [a.shape for a in read_calibration(tmp_path / "images.npy")] == [(2, 3)]
    assert [a.tolist() for a in read_calibration(tmp_path / "ids.safetensors")] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize("name", ["missing.txt", "bad.txt", "bad.npy", "bad.safetensors"])
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    if name != "missing.txt":
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01\xc3")

    with pytest.raises(CompileError, match=f"cannot read .*{name}"):
        read_calibration(tmp_path / name)
