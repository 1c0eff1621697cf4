"""Training runs: interrupted and resumed with equal results, refused where they differ, stopped when they diverge."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors import safe_open

import sylvester as sv
from sylvester.compiler import training_run
from sylvester.compiler.errors import ArtefactError, CompileError
from sylvester.compiler.training_run import uninterrupted
from sylvester.compiler.training_state import FILE
from tests.test_finetune import DATA, FAST, moved, noisy, traced


class Stopped:
    """Progress that presses Ctrl-C after so many steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("teach", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, teach):
    teacher = traced()
    program = noisy(teacher) if teach else teacher
    options = FAST | {"teacher": teacher if teach else None, "checkpoint": tmp_path}
    whole = sv.finetune(program, DATA, 7, **(options | {"checkpoint": None}))
    with pytest.raises(KeyboardInterrupt) as stop:
        sv.finetune(program, DATA, 7, **options, progress=Stopped(3))
    assert "the state after step 3 is in" in stop.value.__notes__[0]
    seen = []
    resumed = sv.finetune(program, DATA, 7, **options, progress=lambda *at: seen.append(at[1]))
    assert seen == [4, 5, 6, 7]
    assert not moved(whole, resumed)
    again = sv.finetune(program, DATA, 7, **options, progress=Stopped(1))
    assert not moved(whole, again)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_ctrl_c_within_a_step_waits_for_its_end():
    done = []

    def step():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == [1]


def test_another_run_is_refused(tmp_path):
    program = traced()
    sv.finetune(program, DATA, 1, checkpoint=tmp_path, **FAST)
    with pytest.raises(CompileError, match="is of another run: steps was 1, is 2"):
        sv.finetune(program, DATA, 2, checkpoint=tmp_path, **FAST)
    with pytest.raises(CompileError, match="the data differs"):
        sv.finetune(program, DATA[:3], 1, checkpoint=tmp_path, **FAST)
    with pytest.raises(CompileError, match="the program differs"):
        sv.finetune(noisy(program), DATA, 1, checkpoint=tmp_path, **FAST)
    with pytest.raises(CompileError, match="the teacher differs"):
        sv.finetune(program, DATA, 1, teacher=program, checkpoint=tmp_path, **FAST)


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(ArtefactError, match="no state of a training run"):
        sv.finetune(traced(), DATA, 1, checkpoint=tmp_path, **FAST)


def test_a_loss_that_diverges_stops_with_the_last_good_state(tmp_path, monkeypatch):
    options = FAST | {"learning_rate": 1e30}
    with pytest.raises(CompileError, match=r"the loss is .* at step 2 of 5: .*; nothing was kept"):
        sv.finetune(traced(), DATA, 5, **options)
    monkeypatch.setattr(training_run, "SECONDS", -1.0)
    with pytest.raises(CompileError, match=r"the loss is .* at step 2 of 5: .*; the state after step 0 is in"):
        sv.finetune(traced(), DATA, 5, checkpoint=tmp_path, **options)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert torch.equal(file.get_tensor("weight/model.norm.weight"), traced().weights["model.norm.weight"])


def test_a_loss_that_the_last_step_ruins_is_seen():
    with pytest.raises(CompileError, match="the loss is"):
        sv.finetune(traced(), DATA, 1, **(FAST | {"learning_rate": 1e30}))


def test_threads_do_not_change_the_result():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(sv.finetune(traced(), DATA, 2, **FAST))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert not moved(*results)


def test_notes_are_the_same_when_nothing_is_left_to_do(tmp_path):
    first, again = (sv.finetune(traced(), DATA, 1, checkpoint=tmp_path, **FAST) for _ in range(2))
    assert first.info["notes"] == again.info["notes"]


def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CompileError, match="cannot keep states in"):
        sv.finetune(traced(), DATA, 1, checkpoint=tmp_path / "file", **FAST, progress=Stopped(1))
