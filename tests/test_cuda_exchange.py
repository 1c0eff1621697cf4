"""Arrays of other software on the device of an artefact, in and out without copies."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sylvester.backends.cuda.emulated import Emulated
from sylvester.backends.cuda.memory import DeviceArray
from sylvester.compiler import compiled as compiled_module
from sylvester.compiler import device_arrays
from sylvester.compiler.errors import InputError
from tests import cuda_models

STREAM = 77


class Elsewhere:
    """An array that other software has on the device."""

    def __init__(self, device, array, offset=0, strides=None, stream=STREAM):
        self.address = device.allocate(array.nbytes + offset) + offset
        device.write(self.address, array)
        self.__cuda_array_interface__ = {
            "version": 3, "shape": array.shape, "typestr": array.dtype.str, "data": (self.address, False),
            "strides": strides, "stream": stream,
        }  # fmt: skip


@pytest.fixture
def compiled():
    with cuda_models.opened(cuda_models.folder(), Emulated()) as made:
        yield made


@pytest.fixture
def expected():
    return cuda_models.reference()(cuda_models.ids(2, 4))["logits"]


def device_of(compiled):
    return compiled._runner.device


def test_arrays_are_read_and_written_where_they_are(compiled, expected):
    device = device_of(compiled)
    given = Elsewhere(device, cuda_models.ids(2, 4))
    device.sent = device.fetched = 0
    found = compiled(given)["logits"]
    assert device.sent == 0
    assert device.fetched == 16, "whether an id was wrong"
    assert device.order == [("follow", STREAM), ("lead", STREAM)]
    interface = found.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["data"]) == ((2, 4, 50), "<f4", (found.address, False))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
    assert compiled.notes == ()


def test_outputs_are_not_written_again(compiled, expected):
    first = compiled(Elsewhere(device_of(compiled), cuda_models.ids(2, 4)))["logits"]
    second = compiled(Elsewhere(device_of(compiled), cuda_models.ids(2, 4) * 0))["logits"]
    assert first.address != second.address
    np.testing.assert_allclose(np.asarray(first), expected, atol=1e-5)


def test_later_calls_wait_for_who_reads_outputs(compiled):
    outputs = compiled(Elsewhere(device_of(compiled), cuda_models.ids(1, 2)))
    device_of(compiled).order.clear()
    del outputs
    compiled(cuda_models.ids(1, 2))
    assert set(device_of(compiled).order) == {("follow", STREAM)}


@pytest.mark.parametrize("layout", [{"offset": 8}, {"strides": (8, 16)}])
def test_what_kernels_cannot_read_is_copied_and_noted(compiled, expected, layout):
    ids = cuda_models.ids(2, 4)
    given = Elsewhere(device_of(compiled), ids if "offset" in layout else ids.T.copy().reshape(2, 4), **layout)
    np.testing.assert_allclose(np.asarray(compiled(given)["logits"]), expected, atol=1e-5)
    assert len(compiled.notes) == 1
    assert "'input_ids' was copied on the device: it is not row-major, or not at a multiple of 16" in compiled.notes[0]


class Tensor(Elsewhere):
    """As torch has them on a GPU."""

    dtype, index = torch.int64, 0

    @property
    def device(self):
        return SimpleNamespace(type="cuda", index=self.index)

    def detach(self):
        return self


@pytest.fixture
def torch_with_a_gpu(monkeypatch):
    plain = device_arrays.is_tensor
    for module in (device_arrays, compiled_module):
        monkeypatch.setattr(module, "is_tensor", lambda value: plain(value) or isinstance(value, Tensor))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device.index))
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: torch.from_numpy(np.asarray(array)))


def test_tensors_give_tensors(compiled, expected, torch_with_a_gpu):
    found = compiled(Tensor(device_of(compiled), cuda_models.ids(2, 4), stream=None))["logits"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert device_of(compiled).order[-1] == ("lead", STREAM)


def test_bfloat16_is_read_as_its_bits(torch_with_a_gpu):
    given = Tensor(Emulated(), np.zeros((2, 3), np.int16))
    given.dtype = torch.bfloat16
    given.view = lambda dtype: Tensor(Emulated(), np.zeros((2, 3), np.int16))
    assert device_arrays.foreign("x", given).dtype == "<u2"


def test_tensors_of_another_gpu_are_refused(compiled, torch_with_a_gpu):
    given = Tensor(device_of(compiled), cuda_models.ids(1, 2))
    given.index = 1
    with pytest.raises(InputError, match=r"expected cuda:0"):
        compiled(given)


def test_arrays_without_a_stream_are_ready(compiled):
    compiled(Elsewhere(device_of(compiled), cuda_models.ids(1, 2), stream=None))
    assert device_of(compiled).order == []


def test_another_dtype_is_refused(compiled):
    with pytest.raises(InputError, match="has dtype float32, expected int64"):
        compiled(Elsewhere(device_of(compiled), np.zeros((1, 2), np.float32)))


def test_ids_out_of_range_are_an_error_of_the_call(compiled):
    with pytest.raises(InputError, match="index 50 is out of range"):
        compiled(Elsewhere(device_of(compiled), np.full((1, 2), cuda_models.VOCAB)))


def test_other_targets_take_no_arrays_of_a_device():
    with pytest.raises(InputError, match="is a Elsewhere, expected a tensor or a numpy array"):
        cuda_models.reference()(Elsewhere(Emulated(), cuda_models.ids(1, 2)))


def test_outputs_are_arrays_of_the_device(compiled):
    found = compiled(Elsewhere(device_of(compiled), cuda_models.ids(1, 2)))["logits"]
    assert isinstance(found, DeviceArray)
    assert found.__cuda_array_interface__["strides"] == (400, 200, 4)
