"""A step's host arrays on the device, in one transfer.

A copy from pinned memory costs a launch whatever its size, and a step of trees needs about ten
small arrays: they travel side by side in one buffer, and what is handed out are views of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

#: Where an array may begin in the buffer: at a multiple of every element's size.
ALIGNMENT = 16

Arrays = Mapping[str, np.ndarray]


def upload(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies ``arrays`` to ``device`` on the current stream, and returns them there, by the same
    names and of the same shapes and dtypes. On the CPU they are the arrays themselves."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    return unpack(pack(arrays, device.type == "cuda").to(device, non_blocking=True), arrays)


def pack(arrays: Arrays, pinned: bool = False) -> torch.Tensor:
    """Returns a host buffer uint8 [n] that holds ``arrays`` one behind another."""
    begins, size = _layout(arrays)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    flat = buffer.numpy()
    for begin, array in zip(begins, arrays.values(), strict=True):
        flat[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return buffer


def unpack(buffer: torch.Tensor, arrays: Arrays) -> dict[str, torch.Tensor]:
    """Returns views of what :func:`pack` has laid into ``buffer``, by name."""
    views = {}
    for begin, (name, array) in zip(_layout(arrays)[0], arrays.items(), strict=True):
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        views[name] = buffer[begin : begin + array.nbytes].view(dtype).view(array.shape)
    return views


def _layout(arrays: Arrays) -> tuple[list[int], int]:
    """Where each array begins in the buffer, and the buffer's size, in bytes."""
    begins, end = [], 0
    for array in arrays.values():
        begins.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return begins, end
