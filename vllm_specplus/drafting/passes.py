"""What the rows of one forward pass of a draft see, and the attention over it.

The rows of all requests lie back to back, without padding, and name the pages of their requests:
our own tree kernels (``kernels/``) read keys and values where they lie, and no tensor that is made
for a pass grows with the texts. Rows of a text see what is before them; nodes of a tree see the
text and their ancestors.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import tree_attention_reference


@dataclass(slots=True)
class Rows:
    """T rows of R requests: where they are, and what they see.

    Behind what a request's rows see of its text lie K *nodes*: the keys of these rows, and before
    them those of rows of earlier passes which they may see.
    """

    SIZES: ClassVar[int] = 7
    """How many numbers :meth:`packed` tells."""

    positions: torch.Tensor
    """int64 [T]"""
    slots: torch.Tensor
    """int64 [T] where their keys and values go, counted over all pages."""
    starts: torch.Tensor
    """int32 [R + 1] offsets of the requests in the rows."""
    contexts: torch.Tensor
    """int32 [R] slots of each request before its first node."""
    ends: torch.Tensor
    """int32 [R] how many of these are seen, from the first on."""
    table: torch.Tensor
    """int32 [R, P] pages of each request."""
    key_starts: torch.Tensor
    """int32 [R + 1] offsets of the requests in the nodes."""
    depths: torch.Tensor
    """int32 [K] positions of the nodes, less those of the ends."""
    related: torch.Tensor
    """In packed pages int32 [K], the parent of each node within its request, -1: none. Else bool
    [T, N], which nodes of its request each row sees."""
    most_rows: int
    """Of one request."""
    reach: int
    """No context has more slots."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in order."""
        return tuple(getattr(self, each.name) for each in fields(self)[:-2])

    def packed(self) -> tuple[tuple[int, ...], torch.Tensor]:
        """All that they are, for another process (:meth:`received`): sizes int [SIZES], and what is
        in the tensors, uint8 [n] on their device."""
        related = self.related.shape[1] if self.related.dim() == 2 else 0
        sizes = (
            len(self.positions), *self.table.shape, len(self.depths), related, self.most_rows,
            self.reach,
        )  # fmt: skip
        # Copies: a single number of any stride passes for contiguous, but not to be read as bytes.
        raw = [
            each.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for each in self.tensors
        ]
        return sizes, torch.cat(raw)

    @classmethod
    def received(
        cls, sizes: Sequence[int], device: torch.device, receive: Callable[[torch.Tensor], Any]
    ) -> Rows:
        """The rows that another process has :meth:`packed`; ``receive`` fills a tensor with its
        bytes."""
        total, requests, pages, nodes, related, most_rows, reach = sizes
        int32, int64 = torch.int32, torch.int64
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (int64, (total,)), (int64, (total,)), (int32, (requests + 1,)), (int32, (requests,)),
            (int32, (requests,)), (int32, (requests, pages)), (int32, (requests + 1,)),
            (int32, (nodes,)),
            (torch.bool, (total, related)) if related else (int32, (nodes,)),
        ]  # fmt: skip
        lengths = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes]
        raw = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
        receive(raw)
        tensors = (
            part.view(dtype).view(shape)
            for part, (dtype, shape) in zip(raw.split(lengths), shapes, strict=True)
        )
        return cls(*tensors, most_rows, reach)

    @classmethod
    def of_text(
        cls, store: PageStore, table: np.ndarray, pieces: Sequence[tuple[int, int]]
    ) -> Rows:
        """Rows of texts: ``pieces`` [R] of (first position, end), none of them empty; ``table``
        int32 [R, P]."""
        firsts, ends = np.array(pieces, np.int32).reshape(-1, 2).T
        counts = ends - firsts
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        depths = np.arange(starts[-1], dtype=np.int32) - np.repeat(starts[:-1], counts)
        positions = np.repeat(firsts, counts) + depths
        request = np.repeat(np.arange(len(counts)), counts)
        slots = table[request, positions // store.page].astype(np.int64) * store.page
        slots += positions % store.page
        related = (
            depths - 1
            if store.packed
            else depths[:, None] >= np.arange(counts.max(), dtype=np.int32)
        )
        positions, slots, starts, firsts, table, depths, related = (
            torch.from_numpy(np.ascontiguousarray(each)).to(store.device)
            for each in (positions.astype(np.int64), slots, starts, firsts, table, depths, related)
        )
        return cls(
            positions, slots, starts, firsts, firsts, table, starts, depths, related,
            int(counts.max()), int(ends.max()),
        )  # fmt: skip


class Attend(Protocol):
    """The attention of one pass, which also keeps the keys and values of its rows."""

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
        scale: float, window: int = 0, soft_cap: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        """[T, heads, head_dim] of ``query`` [T, heads, head_dim] and ``keys``, ``values``
        [T, kv_heads, head_dim], with positions applied. ``window``: positions that a row sees, its
        own among them, 0: all; ``soft_cap``: of the scores, 0: none."""


class PagedAttention:
    """Attention of ``rows`` over the pages of a store."""

    def __init__(self, store: PageStore, rows: Rows, readable: torch.Tensor | None = None):
        """``readable`` bool [pages, page]: which slots of a context are seen; None: all are."""
        self._store, self._rows, self._readable = store, rows, readable
        self._batch = self._of_pass() if store.packed else None

    def __call__(self, layer, query, keys, values, scale, window=0, soft_cap=0.0):
        if {query.dtype, keys.dtype, values.dtype} != {self._store.dtype}:
            # The kernels read bytes.
            raise TypeError(f"the draft's cache is of {self._store.dtype}, not {keys.dtype}")
        self._store.write(layer, self._rows.slots, keys, values)
        if self._batch is not None:
            return self._native(layer, query, scale, window, soft_cap)
        rows = self._rows
        arguments = (
            query, *self._store.pages_of(layer), rows.starts, rows.contexts, rows.table,
            rows.related, scale,
        )  # fmt: skip
        given = {
            "key_starts": rows.key_starts, "ends": rows.ends, "readable": self._readable,
            "depths": rows.depths, "window": window, "soft_cap": soft_cap,
        }  # fmt: skip
        if query.device.type == "cpu":
            output, _ = tree_attention_reference(*arguments, **given)
            return output.to(query.dtype)
        # Of Triton, which an installation for CPUs may lack.
        from vllm_specplus.kernels.tree_attention import tree_attention

        output, _ = tree_attention(
            *arguments, part="all", max_rows=rows.most_rows, max_context_len=rows.reach, **given
        )
        return output

    def _of_pass(self) -> native.TreeBatch:
        """The kernel's description of the rows; what depends on a layer is missing."""
        rows, batch = self._rows, self._store.batch()
        batch.num_requests = len(rows.contexts)
        batch.max_blocks = rows.table.stride(0)
        batch.row_start = rows.key_starts.data_ptr()
        batch.query_start = rows.starts.data_ptr()
        batch.context, batch.end = rows.contexts.data_ptr(), rows.ends.data_ptr()
        batch.block_table = rows.table.data_ptr()
        batch.parents, batch.depths = rows.related.data_ptr(), rows.depths.data_ptr()
        batch.readable = None if self._readable is None else self._readable.data_ptr()
        return batch

    def _native(self, layer, query, scale, window, soft_cap):
        if query.stride()[1:] != (query.shape[2], 1):
            query = query.contiguous()
        batch, output = self._batch, query.new_empty(query.shape)
        batch.num_query_heads = query.shape[1]
        batch.query_stride, batch.output_stride = query.stride(0), output.stride(0)
        batch.scale, batch.window, batch.soft_cap = scale, window, soft_cap
        native.library().specplus_tree_attention(
            ctypes.byref(batch), query.data_ptr(), self._store.packed_pages(layer).data_ptr(),
            output.data_ptr(),
        )  # fmt: skip
        return output
