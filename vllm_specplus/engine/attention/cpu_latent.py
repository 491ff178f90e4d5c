"""Tree attention on vLLM's CPU back end of multi-head latent attention."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from vllm_specplus.engine.attention.base import (
    PageCache,
    TreeAttentionMetadata,
    common_block_size,
    distinct,
    tree_backend,
)
from vllm_specplus.engine.attention.latent import SUPPORTS, LatentTreeAttention, RowsAsRequests
from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import latent_tree_attention_reference
from vllm_specplus.tree import ancestor_mask


class CpuLatentCache(PageCache):
    """Pages of latents [pages, block_size, D]."""

    def __init__(self, layers: Sequence[Any]):
        caches = [layer.kv_cache for layer in layers]
        self.block_size = common_block_size([cache[:, None] for cache in caches])
        self._layers = [(layer.kv_cache, layer.impl.kv_lora_rank) for layer in layers]
        self._rows = [cache.view(-1, cache.shape[-1]) for cache in distinct(caches)]

    def move(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Copy slots, as :meth:`PageCache.move`."""
        read, written = torch.from_numpy(src), torch.from_numpy(dst)
        for rows in self._rows:
            rows[written] = rows[read]

    @staticmethod
    def fits(layer: Any) -> bool:
        """Does a layer's cache have one latent for each token?"""
        return layer.kv_cache.dim() == 3 and layer.kv_cache.shape[2] == layer.impl.head_size

    def read(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield latents [n, 1, kv_lora_rank] and rotary parts [n, 1, D - kv_lora_rank]."""
        at = torch.from_numpy(slots)
        for cache, rank in self._layers:
            rows = cache.view(-1, 1, cache.shape[-1])[at]
            yield rows[..., :rank], rows[..., rank:]

    def warm_up(self) -> None:
        """Build and load the C++ kernels."""
        native.library()


class TreeCPULatentBuilder(RowsAsRequests, MLACommonMetadataBuilder):
    """The stock builder, for requests of several rows that decode."""


@tree_backend
class TreeCPULatentBackend(CPUMLABackend):
    """``CPU_MLA`` with draft trees."""

    vllm_name = "CPU_MLA"
    supports = SUPPORTS
    sees_prompt = True
    divides_metadata = False
    page_cache = CpuLatentCache

    @staticmethod
    def get_impl_cls() -> type[TreeCPULatentImpl]:
        """Name the implementation that attends to trees."""
        return TreeCPULatentImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPULatentBuilder]:
        """Name the builder whose requests of several rows decode."""
        return TreeCPULatentBuilder


class TreeCPULatentImpl(LatentTreeAttention, CPUMLAImpl):
    """The stock implementation, which steps aside for requests with a tree."""

    def _tree_forward(self, layer, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        batch = self._batch(query, kv_cache, tree, output)
        if query.dtype == kv_cache.dtype and native.unsupported(batch) is None:
            native.library().specplus_tree_attention(
                ctypes.byref(batch), query.data_ptr(), kv_cache.data_ptr(), output.data_ptr()
            )
            return
        mask = ancestor_mask(tree.parents.numpy(), tree.query_start_loc.numpy(), tree.max_rows)
        latent_tree_attention_reference(
            query, kv_cache, output,
            rows=tree.rows, query_start_loc=tree.query_start_loc,
            context_lens=tree.context_lens, block_table=tree.block_table,
            ancestors=torch.from_numpy(mask), scale=self.scale,
        )  # fmt: skip

    def _batch(self, query, kv_cache, tree, output) -> native.TreeBatch:
        """Describe a step to the C++ kernel: one KV head, that all query heads share."""
        code = native.DTYPES.get(query.dtype, -1)
        return native.TreeBatch(
            num_requests=len(tree.context_lens), num_query_heads=self.num_heads, num_kv_heads=1,
            head_size=self.head_size, value_size=self.kv_lora_rank,
            block_size=kv_cache.shape[1], layout=native.LATENT, dtype=code, cache_dtype=code,
            max_blocks=tree.block_table.stride(0), scale=self.scale, value_scale=1.0,
            page_stride=kv_cache.stride(0), query_stride=query.stride(0),
            output_stride=output.stride(0), rows=tree.rows.data_ptr(),
            row_start=tree.query_start_loc.data_ptr(), context=tree.context_lens.data_ptr(),
            block_table=tree.block_table.data_ptr(), parents=tree.parents.data_ptr(),
        )  # fmt: skip

    def warm_up(self, layer: Any, dtype: torch.dtype, max_rows: int) -> None:
        """Build and load the C++ kernels."""
        native.library()
