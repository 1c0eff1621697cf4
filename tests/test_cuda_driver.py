"""The calls to NVIDIA's driver, on a fake one that checks what it is given and works in order."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sylvester.backends.cuda import driver as driver_module
from sylvester.backends.cuda import emulated
from sylvester.backends.cuda.device import OutOfMemory, Transfer
from sylvester.codegen import gpu_norms
from sylvester.compiler.errors import CompileError, Unsupported
from tests import cuda_models
from tests.fake_cuda import Fake, library


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def image(tmp_path):
    kernel = gpu_norms.best()[1]
    path = tmp_path / "best.cubin"
    path.write_bytes(emulated.build(kernel, "sm_90").image)
    return path


def numbers(count):
    return np.arange(count, dtype=np.float32)


@pytest.mark.parametrize("pools", [True, False])
def test_memory_is_written_and_read_in_order(pools):
    fake = Fake(pools=pools)
    gpu, found = fake.gpu(), np.zeros(8, np.float32)
    here, there = gpu.allocate(32), gpu.allocate(32)
    sent = numbers(8)
    gpu.write(here, sent)
    sent[:] = -1
    gpu.copy(there, here, Transfer(32, 1, 32, 32))
    gpu.clear(here, 16)
    gpu.read(there, found)
    assert found.tolist() == numbers(8).tolist()
    gpu.read(here, found)
    assert found.tolist() == [0, 0, 0, 0, 4, 5, 6, 7]
    gpu.release(here)
    gpu.release(there)
    gpu.close()
    assert fake.live == 0
    assert ("cuMemAllocFromPoolAsync" in fake.record) == pools
    assert ("cuMemAlloc" in fake.record) != pools


def test_rows_are_copied_at_their_pitches(fake):
    gpu, found = fake.gpu(), np.zeros(12, np.float32)
    here, there = gpu.allocate(48), gpu.allocate(48)
    gpu.write(here, numbers(12))
    gpu.clear(there, 48)
    gpu.copy(there + 4, here, Transfer(width=8, height=3, to_pitch=16, from_pitch=12))
    gpu.read(there, found)
    assert found.reshape(3, 4)[:, 1:3].tolist() == [[0, 1], [3, 4], [6, 7]]


def test_launches_are_packed_for_the_driver(fake, image):
    gpu = fake.gpu()
    function = gpu.function(image, "best_of_parts", 0)
    ids, parts = gpu.allocate(16), gpu.allocate(256)
    gpu.launch(function, (2,), 4, 1000, ("*i64", "*i64"), [ids, parts])
    assert not fake.launches, "work waits until something is read"
    gpu.read(ids, np.zeros(2, np.int64))
    assert fake.launches == [("best_of_parts", (2, 1, 1), 128)]


def test_shared_memory_beyond_the_usual_is_asked_for(fake, image):
    gpu = fake.gpu()
    ids = gpu.allocate(256)
    function = gpu.function(image, "best_of_parts", 100 << 10)
    gpu.launch(function, (1,), 4, 100 << 10, ("*i64", "*i64"), [ids, ids])
    assert "cuFuncSetAttribute" in fake.record


def test_captured_launches_are_done_when_replayed(fake, image):
    gpu = fake.gpu()
    function, ids, found = gpu.function(image, "best_of_parts", 0), gpu.allocate(256), np.zeros(1, np.int64)
    gpu.begin_capture()
    for _ in range(3):
        gpu.launch(function, (1,), 4, 0, ("*i64", "*i64"), [ids, ids])
    graph = gpu.end_capture()
    gpu.read(ids, found)
    assert not fake.launches
    for times in (1, 2):
        gpu.replay(graph)
        gpu.read(ids, found)
        assert len(fake.launches) == 3 * times
    gpu.forget(graph)
    with pytest.raises(CompileError, match="cuGraphLaunch failed with 400"):
        gpu.replay(graph)


def test_reading_is_refused_while_capturing(fake):
    gpu = fake.gpu()
    address = gpu.allocate(256)
    gpu.begin_capture()
    with pytest.raises(CompileError, match="failed with 900"):
        gpu.read(address, np.zeros(1))


def test_what_was_begun_later_is_not_waited_for(fake, image):
    gpu = fake.gpu()
    function, ids = gpu.function(image, "best_of_parts", 0), gpu.allocate(256)
    gpu.write(ids, np.array([3, 4]))
    coming = gpu.begin_read(ids, 16)
    gpu.launch(function, (1,), 4, 0, ("*i64", "*i64"), [ids, ids])
    assert gpu.end_read(coming).view(np.int64).tolist() == [3, 4]
    assert not fake.launches
    gpu.close()
    assert len(fake.launches) == 1
    with pytest.raises(ValueError, match="100000 bytes"):
        gpu.begin_read(ids, 100_000)


def test_streams_of_others_and_time(fake):
    gpu, other = fake.gpu(), fake.gpu()
    gpu.follow(other.stream)
    gpu.lead(other.stream)
    gpu.follow(0)
    assert fake.record[-6:] == ["cuEventRecord", "cuStreamWaitEvent"] * 3
    assert gpu.elapsed(gpu.mark(), gpu.mark()) == 1.5
    assert fake.record.count("cuEventDestroy") == 2


def test_calls_from_other_threads_have_the_context(fake):
    gpu, found = fake.gpu(), []
    thread = threading.Thread(target=lambda: found.append(gpu.free_bytes()))
    thread.start()
    thread.join()
    assert found == [1 << 28]


def test_too_little_memory_is_told_with_numbers():
    gpu = Fake(memory=1_500_000_000).gpu()
    with pytest.raises(OutOfMemory, match=r"2\.000 GB were asked for, 1\.500 GB are free"):
        gpu.allocate(2_000_000_000)


def test_code_that_the_driver_does_not_take(fake, image):
    gpu = fake.gpu()
    with pytest.raises(CompileError, match=r"does not take the kernel nothing of best\.cubin on sm_90: .* with 500"):
        gpu.function(image, "nothing", 0)
    image.write_bytes(b"\x7fELF from elsewhere")
    with pytest.raises(CompileError, match="cuModuleLoadData failed with 200"):
        gpu.function(image, "best_of_parts", 0)


def test_code_that_takes_more_shared_memory_than_the_device_has(fake, image):
    with pytest.raises(Unsupported, match=r"best\.cubin takes 240000 bytes of shared memory, sm_90 has 232448"):
        fake.gpu().function(image, "best_of_parts", 240_000)


def test_a_driver_without_a_device(monkeypatch):
    Fake(devices=0)
    monkeypatch.setattr(driver_module, "LIBRARY", str(library()))
    with pytest.raises(Unsupported, match="found no GPU: cuInit failed with 100: no device"):
        driver_module.first_device()


@pytest.mark.parametrize("call", ["cuStreamCreate", "cuMemPoolCreate"])
def test_failures_name_the_call(fake, call):
    fake.fail(call, 46)
    with pytest.raises(CompileError, match=f"{call} failed with 46: a fault"):
        fake.gpu()


def test_a_model_through_the_driver():
    fake, prompt = Fake(computes=True), cuda_models.ids(1, 3)
    with cuda_models.opened(cuda_models.folder(), fake.gpu()) as compiled:
        assert compiled.generate(prompt, 5).tolist() == cuda_models.reference().generate(prompt, 5).tolist()
    assert fake.record.count("cuGraphLaunch") == 1 + 3, "calls and choices"
    assert not fake.faults
    assert fake.live == 0


def test_prompts_of_a_bucket_are_one_graph_of_the_driver():
    fake = Fake(computes=True)
    with cuda_models.opened(cuda_models.folder(), fake.gpu()) as compiled:
        for length in (17, 30, 23):
            prompt = cuda_models.ids(1, length)
            expected = cuda_models.reference().generate(prompt, 1, reuse=False).tolist()
            assert compiled.generate(prompt, 1, reuse=False).tolist() == expected
    assert fake.record.count("cuGraphInstantiateWithFlags") == 1 + 1, "of the call and of the choice"
    assert fake.record.count("cuGraphLaunch") == 2 + 2
    assert not fake.faults
