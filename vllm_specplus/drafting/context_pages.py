"""Keys and values of one of the target's layers, read where its KV cache has them.

A draft that attends to what the target has computed needs no context of its own. What its rows see
there is their request's *context*: all positions before the newest token, which are verified and
in the cache. Our tree kernels read them in their pages, as trees that have rows and no nodes. Only
where there is no CPU kernel for such pages, those of one request at a time are gathered.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import gather_kv, tree_attention_reference


@dataclass(slots=True)
class ContextRows:
    """T rows of A requests, back to back, each of which sees all of its request's context."""

    starts: torch.Tensor
    """int32 [A + 1] offsets of the requests in the rows."""
    contexts: torch.Tensor
    """int32 [A] positions that they see, from the first on, at least 1."""
    table: torch.Tensor
    """int32 [A, P] pages of each request."""
    most_rows: int
    """Of one request."""
    reach: int
    """No context is longer."""


class ContextPages(ABC):
    """The pages of one layer's keys and values."""

    def __init__(self, kv_heads: int, head_dim: int, page: int, dtype: torch.dtype):
        """``page``: slots per page; ``dtype`` of what they hold."""
        self.kv_heads, self.head_dim, self.page, self.dtype = kv_heads, head_dim, page, dtype

    def attend(self, query: torch.Tensor, rows: ContextRows, scale: float) -> torch.Tensor:
        """Return the attention [T, heads, head_dim], in the type of ``query`` [T, heads,
        head_dim], whose positions are applied."""
        return self._attend(query.to(self.dtype).contiguous(), rows, scale).to(query.dtype)

    @abstractmethod
    def _attend(self, query: torch.Tensor, rows: ContextRows, scale: float) -> torch.Tensor:
        """The same of a contiguous ``query`` of the pages' type."""


class PackedPages(ContextPages):
    """Pages [pages, kv_heads, page, 2 * head_dim] as vLLM's CPU back end packs them."""

    def __init__(self, cache: torch.Tensor, layout: str, batch: native.TreeBatch):
        """``layout``: which of ``native.LAYOUTS``; ``batch``: the kernels' description of such
        pages, which is kept and filled in."""
        super().__init__(batch.num_kv_heads, batch.head_size, batch.block_size, cache.dtype)
        self._cache, self._layout, self._batch = cache, layout, batch
        self.in_place = native.unsupported(batch) is None

    def _attend(self, query, rows, scale):
        if not self.in_place:
            return self._gathered(query, rows, scale)
        batch, output = self._batch, torch.empty_like(query)
        none = torch.zeros_like(rows.starts)
        batch.num_requests, batch.max_blocks = len(rows.contexts), rows.table.stride(0)
        batch.num_query_heads, batch.scale = query.shape[1], scale
        batch.query_stride, batch.output_stride = query.stride(0), output.stride(0)
        # Of nodes there are none, and nobody looks for a row's parent.
        batch.row_start = batch.parents = none.data_ptr()
        batch.query_start, batch.context = rows.starts.data_ptr(), rows.contexts.data_ptr()
        batch.block_table = rows.table.data_ptr()
        native.library().specplus_tree_attention(
            ctypes.byref(batch), query.data_ptr(), self._cache.data_ptr(), output.data_ptr()
        )
        return output

    def _gathered(self, query, rows, scale):
        """The same by torch, of copies of one request's pages at a time."""
        output, starts = torch.empty_like(query), rows.starts.tolist()
        for r, context in enumerate(rows.contexts.tolist()):
            keys, values = gather_kv(self._cache, rows.table[r], context, self._layout)
            own = slice(starts[r], starts[r + 1])
            output[own] = scaled_dot_product_attention(
                query[own].transpose(0, 1)[None].float(), keys[None].float(), values[None].float(),
                scale=scale, enable_gqa=True,
            )[0].transpose(0, 1).to(query.dtype)  # fmt: skip
        return output


class PlainPages(ContextPages):
    """Keys and values apart, [pages, page, kv_heads, head_dim] each, of equal strides."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        _, page, kv_heads, head_dim = keys.shape
        super().__init__(kv_heads, head_dim, page, keys.dtype)
        self._keys, self._values = keys, values

    def _attend(self, query, rows, scale):
        none = torch.zeros_like(rows.starts)
        related = torch.zeros(len(query), 1, dtype=torch.bool, device=query.device)
        arguments = (
            query, self._keys, self._values, rows.starts, rows.contexts, rows.table, related, scale,
        )  # fmt: skip
        if query.device.type == "cpu":
            output, _ = tree_attention_reference(*arguments, key_starts=none)
            return output
        # Of Triton, which an installation for CPUs may lack.
        from vllm_specplus.kernels.tree_attention import tree_attention

        output, _ = tree_attention(
            *arguments, part="all", max_rows=rows.most_rows, max_context_len=rows.reach,
            key_starts=none,
        )  # fmt: skip
        return output
