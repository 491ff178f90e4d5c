"""Host arrays side by side in one buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplus.engine.uploads import ALIGNMENT, pack, unpack, upload

ARRAYS = {
    "rows": np.array([3, 4, 1 << 40], np.int64),
    "nothing": np.empty(0, np.int64),
    "mask": np.array([[True, False], [True, True], [False, True]]),
    "starts": np.array([0, 3], np.int32),
    "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    "weights": np.array([0.5], np.float64),
}


def test_what_is_packed_comes_out_again():
    buffer = pack(ARRAYS)
    assert buffer.dtype == torch.uint8
    assert buffer.numel() == (32 + 0 + 16 + 16 + 32 + 16) // ALIGNMENT * ALIGNMENT
    views = unpack(buffer, ARRAYS)
    assert list(views) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert views[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(views[name].numpy(), array)
        assert views[name].untyped_storage().data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_and_types_are_kept_on_any_device(device):
    for name, tensor in upload(ARRAYS, torch.device(device)).items():
        assert tensor.device.type == device
        assert tuple(tensor.shape) == ARRAYS[name].shape
        assert tensor.dtype == torch.from_numpy(ARRAYS[name].copy()).dtype


def test_on_the_cpu_nothing_is_copied():
    rows = upload(ARRAYS, torch.device("cpu"))["rows"]
    assert rows.data_ptr() == ARRAYS["rows"].ctypes.data


def test_nothing_at_all():
    assert upload({}, torch.device("meta")) == {}
