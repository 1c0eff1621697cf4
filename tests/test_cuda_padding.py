"""Prompts of many lengths are calls of few sizes on GPUs, with the tokens of the model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from sylvester.backends.cuda.device import NullDevice
from sylvester.backends.cuda.emulated import Emulated
from sylvester.compiler.manifest import NAME, read
from sylvester.compiler.runner import PADDING
from sylvester.compiler.session import Session
from tests import cuda_models


@pytest.fixture(scope="module")
def compiled():
    with cuda_models.opened(cuda_models.folder(), Emulated()) as made:
        yield made


@pytest.fixture
def idle():
    with cuda_models.opened(cuda_models.folder(), NullDevice()) as made:
        yield made


def sizes(runner):
    """Entries and numbers of tokens that kernels were prepared for."""
    return [(entry, shapes[0][1]) for entry, shapes, _ in runner._calls]


@pytest.mark.parametrize(
    ("batch", "length", "new", "options"), [(1, 17, 2, {}), (2, 33, 2, {}), (1, 40, 1, {"chunk": 20})]
)
def test_tokens_are_those_of_the_model(compiled, batch, length, new, options):
    prompt = cuda_models.ids(batch, length)
    expected = cuda_models.reference().generate(prompt, new, reuse=False).tolist()
    assert compiled.generate(prompt, new, reuse=False, **options).tolist() == expected


def test_a_conversation_goes_on_in_padded_calls(compiled):
    prompt = cuda_models.ids(1, 30)
    compiled.generate(prompt[:, :10], 1)
    expected = cuda_models.reference().generate(prompt, 1, reuse=False).tolist()
    assert compiled.generate(prompt, 1).tolist() == expected
    assert ("decode", 32) in sizes(compiled._runner)


def test_prompts_of_a_bucket_are_one_graph(idle):
    runner = idle._runner
    for length in range(17, 33):
        idle.generate(cuda_models.ids(1, length), 1, reuse=False)
    assert sizes(runner) == [("start", 32)]
    assert len(runner.graphs._made) == 1
    assert runner.device.replays == 15 + 15, "calls and choices but the first"


def test_calls_have_the_sizes_of_buckets_where_they_fit(idle):
    for length in (1, 2, 16, 17, 33, 64, 65):
        idle.generate(cuda_models.ids(1, length), 1, reuse=False)
    session = Session.begin(idle._runner, cuda_models.ids(1, 96), chunk=48)
    session.feed(cuda_models.ids(1, 96))
    assert sizes(idle._runner) == [
        ("start", 1), ("start", 16), ("start", 32), ("start", 64), ("start", 65), ("decode", 48),
    ]  # fmt: skip


def test_what_is_called_by_name_has_its_own_sizes(compiled):
    prompt = cuda_models.ids(1, 19)
    runner, inputs = compiled._runner, {"input_ids": prompt}
    assert compiled(prompt)["logits"].shape == (1, 19, cuda_models.VOCAB)
    found = runner.run("start", inputs, runner.new_state("start", inputs))["logits"]
    session = Session.begin(runner, prompt)
    np.testing.assert_allclose(np.asarray(session.feed(prompt)), found[:, 0], atol=1e-5)
    assert {("prefill", 19), ("start", 19), ("start", 32)} <= {*sizes(runner)}


def test_the_manifest_says_so_and_one_that_does_not_pads_nothing(tmp_path):
    folder = shutil.copytree(cuda_models.folder(), tmp_path / "made")
    manifest = read(folder)
    assert manifest.generation.padded
    assert [spec.name for spec in manifest.entries["start"].inputs] == ["input_ids", PADDING]
    data = json.loads((folder / NAME).read_text())
    del data["generation"]["padded"]
    (folder / NAME).write_text(json.dumps(data))
    with cuda_models.opened(folder, NullDevice()) as old:
        old.generate(cuda_models.ids(1, 17), 1)
        assert sizes(old._runner) == [("start", 17)]
