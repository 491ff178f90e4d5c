"""What the engine and a draft's process say to each other: JSON and arrays, and no code.

A message in bytes is the length of its header (8, little-endian), the header (JSON: kind, fields,
and name, type and shape of every array), and the arrays, each at a multiple of 16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_ALIGN = 16


@dataclass(frozen=True, slots=True)
class Message:
    """One message."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Values of JSON."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Return it in bytes."""
        arrays = {name: np.ascontiguousarray(each) for name, each in self.arrays.items()}
        told = [[name, each.dtype.str, list(each.shape)] for name, each in arrays.items()]
        header = json.dumps([self.kind, self.fields, told]).encode()
        parts = [len(header).to_bytes(8, "little"), header]
        size = 8 + len(header)
        for each in arrays.values():
            parts += [bytes(-size % _ALIGN), each.tobytes()]
            size += -size % _ALIGN + each.nbytes
        return b"".join(parts)

    @classmethod
    def unpack(cls, raw: bytes) -> Message:
        """Return what was packed; arrays are views of ``raw``. ValueError for other bytes."""
        end = 8 + int.from_bytes(raw[:8], "little")
        kind, fields, told = json.loads(raw[8:end])
        arrays = {}
        for name, code, shape in told:
            begin = end + -end % _ALIGN
            dtype, count = np.dtype(code), math.prod(shape)
            if dtype.hasobject:
                raise ValueError(f"message {kind!r} holds an array of objects")
            arrays[name] = np.frombuffer(raw, dtype, count, begin).reshape(shape)
            end = begin + dtype.itemsize * count
        return cls(kind, fields, arrays)


def to_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Uint8 [..., n * itemsize] of a tensor [..., n]: NumPy knows no bfloat16."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy()


def from_bytes(raw: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The tensor [..., n] whose bytes uint8 [..., n * itemsize] are, a copy on ``device``."""
    if not raw.size:  # of which NumPy gives no strides that could be viewed
        return torch.empty(*raw.shape[:-1], raw.shape[-1] // dtype.itemsize, dtype=dtype).to(device)
    return torch.from_numpy(raw.copy()).view(dtype).to(device)


def arrays_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """:func:`to_bytes` of each."""
    return {name: to_bytes(each) for name, each in tensors.items()}
