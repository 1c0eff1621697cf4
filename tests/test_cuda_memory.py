"""Arrays on an emulated device against numpy, and memory that is used again."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from sylvester.backends.cuda.device import NullDevice, OutOfMemory
from sylvester.backends.cuda.emulated import Emulated
from sylvester.backends.cuda.memory import Heap, is_contiguous, stepped, transfers

SHAPE = (3, 2, 6, 4)
PARTS = {
    "rows": np.s_[:1], "all_but_one": np.s_[1:], "positions": np.s_[:, :, 2:5], "both": np.s_[1:, :, 3:],
    "last": np.s_[:, -1], "new": np.s_[:, None], "none": np.s_[:, :0], "list": np.s_[:, :, [4, 1]],
    "one": np.s_[2, 1, 3], "past_the_end": np.s_[:, 1:9], "repeated": np.s_[1:, [1, 0, 1]],
    "on_the_host": np.s_[:, ::2], "arrays": (np.arange(3), np.array([0, 1, 0])),
}  # fmt: skip


def held(array):
    made = Heap(Emulated()).array(array.shape, array.dtype)
    made[:] = array
    return made


@pytest.fixture
def numbers():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_are_those_of_numpy(numbers, part):
    found = held(numbers)[part]
    assert found.shape == numbers[part].shape
    np.testing.assert_array_equal(np.asarray(found), numbers[part])


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (np.s_[1:, :, 1:3], np.s_[:1, :, 1:3]),
        (np.s_[:, :, 1:3], np.s_[:, :, [2, 5]]),
        (np.s_[2], np.s_[0]),
        (np.s_[:, 1], np.s_[0, 0]),
        (np.s_[:, :, 3:3], np.s_[:, :, 2:2]),
    ],
)
def test_parts_are_copied_on_the_device(numbers, target, source):
    found = held(numbers)
    found.heap.device.sent = found.heap.device.fetched = 0
    found[target] = found[source]
    assert found.heap.device.sent == found.heap.device.fetched == 0
    numbers[target] = numbers[source].copy()
    np.testing.assert_array_equal(np.asarray(found), numbers)


def test_arrays_of_the_host_are_put_into_parts(numbers):
    found = held(numbers)
    found[:, :, 1:3] = 7
    kept = found[:, :, 4:].copy()
    found[:, :, 4:] = 0
    found[:, :, 4:] = kept
    numbers[:, :, 1:3] = 7
    np.testing.assert_array_equal(np.asarray(found), numbers)


def test_positions_of_all_heads_are_one_transfer():
    strides = (2 * 6 * 16, 6 * 16, 16, 4)
    ((to, origin, made),) = transfers((3, 2, 2, 4), strides, strides, 4)
    assert (to, origin, made.width, made.height, made.to_pitch) == (0, 0, 32, 6, 96)


def test_a_size_gets_the_address_that_it_had():
    heap = Heap(NullDevice())
    first = heap.take(1000)
    address = first.address
    del first
    other = heap.take(5000)
    assert heap.take(1001).address == address != other.address


def test_kept_memory_gives_way():
    device = NullDevice(memory=1 << 20)
    heap = Heap(device)
    heap.take(1 << 19)
    assert heap.take(1 << 20).nbytes == 1 << 20
    with pytest.raises(OutOfMemory, match=r"0\.002 GB were asked for, 0\.001 GB are free"):
        heap.take(2 << 20)


def test_few_pieces_are_kept():
    device = NullDevice()
    heap = Heap(device)
    for n in range(1, 40):
        heap.take(n << 10)
    assert len(device.held) < 12
    heap.close()
    gc.collect()
    assert not device.held


@pytest.mark.parametrize("nbytes", [0, 1, 65536, 65537, 10**6, 10**9 + 1])
def test_steps_are_wide_for_little_and_narrow_for_much(nbytes):
    assert max(65536, nbytes) <= stepped(nbytes) <= max(131072, nbytes * 9 / 8)


def test_sizes_of_one_need_no_strides():
    assert is_contiguous((1, 3), (4, 4), 4)
    assert is_contiguous((2, 0), (1, 1), 4)
    assert not is_contiguous((2, 3), (4, 8), 4)


def test_memory_that_others_read_is_used_again_after_them():
    device = Emulated()
    heap = Heap(device)
    heap.lend([5])
    taken = [heap.take(1000), heap.take(5000)]
    assert device.order == []
    taken.clear()
    heap.take(1000)
    assert device.order == [("follow", 5)]
    heap.close()
    assert device.order == [("follow", 5)] * 3
