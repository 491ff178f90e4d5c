"""What our back ends on CUDA share: pages, and how trees are taken out of a batch.

The rows of draft trees are taken out of the batch, attended to by a path of their own and put
back; all other rows, and batches without trees, go through the stock implementation. vLLM writes K
and V to the cache before ``forward``, so every path reads them from there. Only the tree batch's
own lengths are used, never the stock metadata's: schedules computed ahead of time for
FlashAttention 3 and rows padded for CUDA graphs belong to the stock path. Tree batches must not
run in FULL CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_specplus.drafting.context_pages import PlainPages
from vllm_specplus.engine.attention.base import (
    PageCache,
    TreeAttention,
    TreeAttentionMetadata,
    common_block_size,
    distinct,
)
from vllm_specplus.kernels import move_slots as kernel


def kv_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V [num_blocks, block_size, KH, D] of a layer's cache
    [num_blocks, KH, block_size, 2 D].

    vLLM stores K and V of a token and head side by side, in FLASH_ATTN and TRITON_ATTN alike.
    """
    key_cache, value_cache = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    # With one KV head its stride is arbitrary; FlashAttention 3 and 4 need an aligned one.
    return (
        canonicalize_singleton_dim_strides(key_cache),
        canonicalize_singleton_dim_strides(value_cache),
    )


class CudaPageCache(PageCache):
    """Pages in which K and V of a token and head lie side by side."""

    def __init__(self, layers: Sequence[Any]):
        self._caches = [layer.kv_cache for layer in layers]
        self.block_size = common_block_size(self._caches)
        self._device = self._caches[0].device
        table = kernel.strips(distinct(self._caches))
        self._words = kernel.block_words(table)
        self._table = torch.from_numpy(table).to(self._device)

    def move(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Copy slots, as :meth:`PageCache.move`: one upload and one launch, whatever the layers,
        on the current stream."""
        if len(src):
            self._launch(np.concatenate((src, dst, kernel.runs(src, dst))), len(src))

    def _launch(self, moves: np.ndarray, num_moves: int) -> None:
        kernel.move_slots(self._table, self._upload(moves), num_moves, self.block_size, self._words)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def read(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield keys and values, as :meth:`PageCache.read`."""
        tokens = self._upload(slots)
        page, place = tokens // self.block_size, tokens % self.block_size
        for cache in self._caches:
            yield cache.transpose(1, 2)[page, place].chunk(2, dim=-1)

    @staticmethod
    def context_pages(layer: Any) -> PlainPages:
        """Describe the pages, as :meth:`PageCache.context_pages`."""
        return PlainPages(*kv_views(layer.kv_cache))

    def warm_up(self) -> None:
        """Compile the kernel: one run of no moves."""
        self._launch(np.zeros(2, np.int64), 0)


class CudaTreeAttention(TreeAttention):
    """Mixin before a stock implementation: takes out the tree rows and puts them back.

    A subclass implements :meth:`_attend_to_tree`.
    """

    def _tree_forward(self, layer, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        tree_query = query.index_select(0, tree.rows)
        tree_output = self._attend_to_tree(layer, tree_query, *kv_views(kv_cache), tree)
        output.index_copy_(0, tree.rows, tree_output)

    def _attend_to_tree(
        self,
        layer: Any,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        tree: TreeAttentionMetadata,
    ) -> torch.Tensor:
        """Return the attention [T, H, D] of the tree rows ``query`` [T, H, D] over caches
        [num_blocks, block_size, KH, D]."""
        raise NotImplementedError

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Deny it: the tree path writes its output in the data type of the queries."""
        return False

    def warm_up(self, layer: Any, dtype: torch.dtype, max_rows: int) -> None:
        """Compile the kernels for trees of every size up to ``max_rows``, by running them over
        page 0 of the cache, which they only read."""
        views = kv_views(layer.kv_cache)
        for rows, context in self._warm_up_sizes(layer.kv_cache, dtype, max_rows):
            query = torch.zeros(
                rows, self.num_heads, self.head_size, dtype=dtype, device=layer.kv_cache.device
            )
            tree = self._chain(rows, context, views[0])
            self._attend_to_tree(layer, query, *views, tree)

    def _warm_up_sizes(
        self, kv_cache: torch.Tensor, dtype: torch.dtype, max_rows: int
    ) -> list[tuple[int, int]]:
        """Return (rows, context length) of a tree for every variant of the kernels."""
        raise NotImplementedError

    def _chain(self, rows: int, context: int, keys: torch.Tensor) -> TreeAttentionMetadata:
        return chain_metadata(rows, context, keys.shape[1], keys.device)


def chain_metadata(
    rows: int, context: int, block_size: int, device: torch.device
) -> TreeAttentionMetadata:
    """Describe one request with a chain of ``rows`` behind ``context`` tokens, all in page 0."""

    def put(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    pages = -(-(context + rows) // block_size)
    return TreeAttentionMetadata(
        rows=put([*range(rows)], torch.int64),
        query_start_loc=put([0, rows]),
        context_lens=put([context]),
        block_table=torch.zeros(1, pages, dtype=torch.int32, device=device),
        parents=None,
        ancestors=torch.ones(rows, rows, dtype=torch.bool, device=device).tril(),
        max_rows=rows,
        max_context_len=context,
        other_rows=None,
        other=None,
        depths=put([*range(rows)]),
    )


class NoFullGraphs:
    """Mixin before a stock metadata builder: a captured graph replays stock kernels and would
    skip the trees, so vLLM is asked to run attention outside its CUDA graphs (piecewise mode)."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Deny FULL graphs."""
        return AttentionCGSupport.NEVER
