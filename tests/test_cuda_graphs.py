"""Which launches become graphs, on a device that counts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from sylvester.backends.cuda import graphs, runtime
from sylvester.backends.cuda.device import NullDevice
from tests import cuda_models


@pytest.fixture
def compiled():
    with cuda_models.opened(cuda_models.folder(), NullDevice()) as made:
        yield made


def device_of(compiled):
    return compiled._runner.device


class Counted:
    """Launches of a key."""

    def __init__(self, kept, monkeypatch):
        monkeypatch.setattr(graphs, "KEPT", kept)
        monkeypatch.setattr(graphs, "REMEMBERED", 3)
        self.device, self.made, self.forgotten = NullDevice(), [], []
        self.graphs = graphs.Graphs(self.device)
        monkeypatch.setattr(self.device, "forget", self.forgotten.append)

    def run(self, *keys):
        for key in keys:
            self.graphs.run(key, lambda key=key: self.made.append(key))
        return self.made


def test_the_second_of_equal_calls_is_captured(monkeypatch):
    counted = Counted(2, monkeypatch)
    assert counted.run("a", "b", "a", "a", "b", "a") == ["a", "b", "a", "b"]
    assert counted.device.replays == 4


def test_the_least_recently_used_graph_is_dropped(monkeypatch):
    counted = Counted(2, monkeypatch)
    counted.run("a", "a", "b", "b", "a", "c", "c")
    assert len(counted.forgotten) == 1
    counted.made.clear()
    assert counted.run("a", "c", "b") == ["b"]
    counted.graphs.clear()
    assert len(counted.forgotten) == 3


def test_few_keys_are_remembered(monkeypatch):
    assert Counted(2, monkeypatch).run(*"abcda") == [*"abcda"]


def test_a_failure_ends_the_capture(monkeypatch):
    counted = Counted(2, monkeypatch)
    counted.run("a")
    with pytest.raises(ZeroDivisionError):
        counted.graphs.run("a", lambda: 1 // 0)
    assert len(counted.forgotten) == 1
    assert counted.run("b") == ["a", "b"]


def test_a_prompt_of_a_length_is_captured_when_it_comes_again(compiled):
    for length in (3, 4, 5, 4):
        compiled(cuda_models.ids(1, length))
    assert device_of(compiled).replays == 1


def test_other_caches_are_another_graph(compiled):
    runner, inputs = compiled._runner, {"input_ids": np.zeros((1, 1), np.int64)}
    first, second = (runner.new_state("decode", inputs) for _ in range(2))
    for state in (first, second):
        runner.run("decode", inputs, state)
    assert device_of(compiled).replays == 0
    for state in (first, second):
        state.position = 3
        runner.run("decode", inputs, state)
    assert device_of(compiled).replays == 2


def test_steps_at_all_positions_are_few_graphs(compiled):
    compiled.generate(cuda_models.ids(1, 4), 12)
    runner = compiled._runner
    assert len(runner.graphs._made) == len(runner.choices._made) == 2, "for logits in two places"
    assert device_of(compiled).replays == (11 - 3) + (12 - 2), "calls and choices but those that were first"


def test_the_caches_of_a_later_session_are_those_of_an_earlier_one(compiled):
    compiled.generate(cuda_models.ids(1, 4), 4, reuse=False)
    replays = device_of(compiled).replays
    compiled.generate(cuda_models.ids(1, 4), 4, reuse=False)
    assert device_of(compiled).replays == replays + 4 + 4, "a call and a choice for every token"


def test_guards_that_the_cpu_reads_are_not_captured(tmp_path):
    folder = shutil.copytree(cuda_models.folder(), tmp_path / "made")
    data = json.loads((folder / runtime.FILE).read_text())
    decode = data["entries"]["decode"]
    decode["launches"][2]["guard"] = next(name for name, b in decode["buffers"].items() if b["kind"] == "arena")
    (folder / runtime.FILE).write_text(json.dumps(data))
    with cuda_models.opened(folder, NullDevice()) as compiled:
        assert compiled.notes == (f"decode: {runtime.GUARDED}",)
        runner, inputs = compiled._runner, {"input_ids": np.zeros((1, 1), np.int64)}
        state, counts = runner.new_state("decode", inputs), []
        for flag in (0, 1, 0):
            runner._skips = lambda address, flag=flag: bool(flag)
            runner.run("decode", inputs, state)
            counts.append(len(device_of(compiled).launches))
        assert device_of(compiled).replays == 0
        assert counts[1] - counts[0] == counts[0] - 1
        assert counts[2] - counts[1] == counts[0]
