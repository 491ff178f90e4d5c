"""Tree attention on vLLM's TRITON_MLA: of multi-head latent attention by our one Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backends.mla.triton_mla import (
    TritonMLABackend,
    TritonMLAImpl,
    TritonMLAMetadataBuilder,
)

from vllm_specplus.engine.attention.base import PageCache, TreeAttentionMetadata, tree_backend
from vllm_specplus.engine.attention.cuda import CudaPageCache, NoFullGraphs, chain_metadata
from vllm_specplus.engine.attention.latent import SUPPORTS, LatentTreeAttention, RowsAsRequests
from vllm_specplus.engine.attention.triton import LONG_CONTEXT
from vllm_specplus.kernels.tree_attention import latent_group, latent_tree_attention, variants


class CudaLatentCache(CudaPageCache):
    """Pages of latents [pages, block_size, D], as if of one KV head."""

    def __init__(self, layers: Sequence[Any]):
        self._ranks = [layer.impl.kv_lora_rank for layer in layers]
        super().__init__([SimpleNamespace(kv_cache=layer.kv_cache[:, None]) for layer in layers])

    @staticmethod
    def fits(layer: Any) -> bool:
        """Does a layer's cache have one latent for each token?"""
        return layer.kv_cache.dim() == 3 and layer.kv_cache.shape[2] == layer.impl.head_size

    context_pages = staticmethod(PageCache.context_pages)  # refuses

    def read(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield latents [n, 1, kv_lora_rank] and rotary parts [n, 1, D - kv_lora_rank]."""
        tokens = self._upload(slots)
        page, place = tokens // self.block_size, tokens % self.block_size
        for cache, rank in zip(self._caches, self._ranks, strict=True):
            rows = cache.transpose(1, 2)[page, place]
            yield rows[..., :rank], rows[..., rank:]


class TreeTritonLatentBuilder(RowsAsRequests, NoFullGraphs, TritonMLAMetadataBuilder):
    """The stock builder without FULL graphs, for requests of several rows that decode."""


@tree_backend
class TreeTritonLatentBackend(TritonMLABackend):
    """``TRITON_MLA`` with draft trees."""

    vllm_name = "TRITON_MLA"
    supports = SUPPORTS
    sees_prompt = True
    divides_metadata = False
    page_cache = CudaLatentCache

    @staticmethod
    def get_impl_cls() -> type[TreeTritonLatentImpl]:
        """Name the implementation that attends to trees."""
        return TreeTritonLatentImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonLatentBuilder]:
        """Name the builder whose requests of several rows decode."""
        return TreeTritonLatentBuilder


class TreeTritonLatentImpl(LatentTreeAttention, TritonMLAImpl):
    """The stock implementation, which steps aside for requests with a tree."""

    def _tree_forward(self, layer, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        attended = self._attend(query.index_select(0, tree.rows), kv_cache, tree)
        output.index_copy_(0, tree.rows, attended)

    def _attend(self, query, kv_cache, tree: TreeAttentionMetadata) -> torch.Tensor:
        return latent_tree_attention(
            query, kv_cache, tree.query_start_loc, tree.context_lens, tree.block_table,
            tree.ancestors, self.scale, self.kv_lora_rank, max_rows=tree.max_rows,
            max_context_len=tree.max_context_len,
        )  # fmt: skip

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Deny it: the tree path writes its output in the data type of the queries."""
        return False

    def warm_up(self, layer: Any, dtype: torch.dtype, max_rows: int) -> None:
        """Compile the kernel for trees of every size, without a context and with one long enough to
        be divided, by running it over page 0 of the cache, which it only reads."""
        cache = layer.kv_cache
        page = cache.shape[1], cache.device
        group = latent_group(self.num_heads)
        for rows in variants(group, self.head_size, dtype.itemsize, max_rows):
            query = cache.new_zeros(rows, self.num_heads, self.head_size, dtype=dtype)
            for context in (0, LONG_CONTEXT):
                self._attend(query, cache, chain_metadata(rows, context, *page))
