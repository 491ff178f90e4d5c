"""The target's KV cache, slot by slot: compaction, and reading for self-speculation.

Compaction: accepted nodes move to the consecutive slots their text owns.

A tree's rows lie in the cache at consecutive slots after the context, in node
order. Keys carry the rotary phase of the node's depth, which is its final
position; so after verification the accepted rows only have to be copied, row by
row of the path, to the slots right after the root.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import torch

from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import move_slots_reference, page_offsets
from vllm_specplus.step import Acceptance


def moves(acceptance: Acceptance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to copy: (request, source row, destination row), int64 [n] each, in an order
    safe to copy in.

    Row ``path[r, j]`` becomes row j of its request. A path never descends below its
    own column, so no source is overwritten before it is read.
    """
    path = acceptance.path
    columns = np.arange(path.shape[1])
    request, column = np.nonzero((path != columns) & (path >= 0))
    return request, path[request, column].astype(np.int64), column


def distinct(kv_caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The caches without repeats: layers may share one, which must move only once."""
    return list({cache.data_ptr(): cache for cache in kv_caches}.values())


class CpuReader:
    """Reads slots of vLLM's CPU cache, whose pages are packed for its kernels."""

    def __init__(self, kv_caches: list[torch.Tensor], layout: str):
        _, _, block_size, twice = kv_caches[0].shape
        self._caches = kv_caches
        self._block_size = block_size
        self._offsets = page_offsets(layout, block_size, twice // 2)

    def __call__(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [n, kv_heads, head_dim] at ``slots`` int64 [n], layer by layer."""
        slots = torch.from_numpy(slots)
        page, place = slots // self._block_size, slots % self._block_size
        cache = self._caches[0]
        heads = torch.arange(cache.shape[1]) * cache.stride(1)
        begin = (page[:, None] * cache.stride(0) + heads)[..., None]
        key_at, value_at = (begin + table[place][:, None] for table in self._offsets)
        for cache in self._caches:
            flat = cache.view(-1)
            yield flat[key_at], flat[value_at]


class CudaReader:
    """Reads slots of a CUDA cache [pages, KV heads, block_size, 2 * head_dim]."""

    def __init__(self, kv_caches: list[torch.Tensor]):
        self._caches = kv_caches

    def __call__(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As :class:`CpuReader`."""
        device = self._caches[0].device
        slots = torch.from_numpy(slots).pin_memory().to(device, non_blocking=True)
        block_size = self._caches[0].shape[2]
        page, place = slots // block_size, slots % block_size
        for cache in self._caches:
            yield cache.transpose(1, 2)[page, place].chunk(2, dim=-1)


class CpuMover:
    """Moves slots in vLLM's CPU cache, all layers in one call."""

    def __init__(self, kv_caches: list[torch.Tensor], layout: str):
        self._caches = kv_caches
        self._layout = layout
        _, heads, block_size, twice = kv_caches[0].shape
        self._batch = native.TreeBatch(
            num_kv_heads=heads,
            head_size=twice // 2,
            block_size=block_size,
            layout=native.LAYOUTS[layout],
            dtype=native.DTYPES[kv_caches[0].dtype],
            page_stride=kv_caches[0].stride(0),
            head_stride=kv_caches[0].stride(1),
        )
        self._pointers = (ctypes.c_void_p * len(kv_caches))(*(c.data_ptr() for c in kv_caches))

    def __call__(self, src: np.ndarray, dst: np.ndarray) -> None:
        lib = native.library()
        if lib is None:
            for cache in self._caches:
                move_slots_reference(
                    cache, torch.from_numpy(src), torch.from_numpy(dst), self._layout
                )
            return
        lib.specplus_move_slots(
            ctypes.byref(self._batch), self._pointers, len(self._caches),
            src.ctypes.data, dst.ctypes.data, len(src),
        )  # fmt: skip


class CudaMover:
    """Moves slots in a CUDA cache, layer by layer, on the current stream."""

    def __init__(self, kv_caches: list[torch.Tensor]):
        self._caches = kv_caches

    def __call__(self, src: np.ndarray, dst: np.ndarray) -> None:
        from vllm_specplus.engine.attention.cuda import compact_kv

        device = self._caches[0].device
        both = torch.from_numpy(np.stack([src, dst])).pin_memory().to(device, non_blocking=True)
        for cache in self._caches:
            compact_kv(cache, both[0], both[1])
