"""Tree attention on GPUs: subclasses of vLLM's FLASH_ATTN and TRITON_ATTN back ends.

In both, the rows of draft trees are taken out of the batch, attended to by a path of their own and
put back; all other rows, and batches without trees, go through the stock implementation. vLLM
writes K and V to the cache before ``forward``, so every path reads them from there. Only the tree
batch's own lengths are used, never the stock metadata's: schedules computed ahead of time for
FlashAttention 3 and rows padded for CUDA graphs belong to the stock path. Tree batches must not
run in FULL CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_specplus.engine.attention.base import (
    PictureAttention,
    TreeAttentionMetadata,
    tree_metadata,
)
from vllm_specplus.kernels.tree_attention import tree_attention


def flash_tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tree: TreeAttentionMetadata,
    scale: float,
    fa_version: int,
    num_splits: int = 0,
) -> torch.Tensor:
    """Attention of the tree rows ``query`` [T, H, D]: context by FlashAttention, tree by Triton.

    The caches are [num_blocks, block_size, KH, D]. ``num_splits`` is FlashAttention's: 0 lets it
    choose. Returns [T, H, D] in the data type of ``query``.
    """
    context_output, context_lse = fa_utils.flash_attn_varlen_func(
        q=query,
        k=key_cache,
        v=value_cache,
        cu_seqlens_q=tree.query_start_loc,
        max_seqlen_q=tree.max_rows,
        seqused_k=tree.context_lens,
        # At least 1: FlashAttention sizes its launch by it, and a context may be empty.
        max_seqlen_k=max(tree.max_context_len, 1),
        softmax_scale=scale,
        causal=False,
        block_table=tree.block_table,
        return_softmax_lse=True,
        fa_version=fa_version,
        num_splits=num_splits,
    )
    tree_output, tree_lse = tree_attention(
        query,
        key_cache,
        value_cache,
        tree.query_start_loc,
        tree.context_lens,
        tree.block_table,
        tree.ancestors,
        scale,
        part="tree",
        max_rows=tree.max_rows,
    )
    # FlashAttention's output for an empty context is 0 and its LSE -inf or, in version 2, inf;
    # merge_attn_states gives no weight to either.
    output = torch.empty_like(query)
    merge_attn_states(output, context_output, context_lse, tree_output, tree_lse)
    return output


class _TreeAttention:
    """Mixin before a stock implementation: attends to the tree rows of a batch apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if feature := self._unsupported():
            raise NotImplementedError(f"vllm-specplus does not support draft trees with {feature}")

    def _unsupported(self) -> str | None:
        """What this layer has that the tree path ignores."""
        config = get_current_vllm_config_or_none()
        rswa_window = config and config.model_config and config.model_config.rswa_window
        features = {
            "sliding-window attention": self.sliding_window != (-1, -1),
            "reference sliding-window attention": bool(rswa_window),
            # An attribute of TRITON_ATTN only.
            "chunked attention": getattr(self, "chunk_lookback", -1) >= 0,
            "ALiBi": self.alibi_slopes is not None,
            "attention logits soft-capping": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            "a quantized KV cache": is_quantized_kv_cache(self.kv_cache_dtype),
            "decode context parallelism": self.dcp_world_size > 1,
            "encoder or cross attention": self.attn_type != AttentionType.DECODER,
        }
        return next((feature for feature, used in features.items() if used), None)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in the stock implementation: ``query`` and ``output`` [num_tokens, H, D],
        ``kv_cache`` [num_blocks, KH, block_size, 2 * D]."""
        tree = tree_metadata(attn_metadata)
        if tree is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )

        if tree.other_rows is not None:
            other_query = query.index_select(0, tree.other_rows)
            other_output = torch.empty_like(other_query)
            # K and V of these rows are read from the cache; ``key`` and ``value`` are unused.
            super().forward(layer, other_query, key, value, kv_cache, tree.other, other_output)
            output.index_copy_(0, tree.other_rows, other_output)

        self._tree_forward(layer, query, kv_cache, tree, output)
        return output

    def _tree_forward(self, layer, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        key_cache, value_cache = kv_views(kv_cache)
        tree_query = query.index_select(0, tree.rows)
        tree_output = self._attend_to_tree(tree_query, key_cache, value_cache, tree)
        output.index_copy_(0, tree.rows, tree_output)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """The tree path writes its output in the data type of the queries."""
        return False


class TreeFlashAttentionImpl(_TreeAttention, FlashAttentionImpl):
    """FlashAttention; tree rows by :func:`flash_tree_attention`."""

    def _unsupported(self) -> str | None:
        if self.fa4_hd256:
            return (
                "FlashAttention 4 and head size 256, whose kernel needs page-aligned lengths;"
                " choose the TRITON_ATTN attention backend"
            )
        return super()._unsupported()

    def _attend_to_tree(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        tree: TreeAttentionMetadata,
    ) -> torch.Tensor:
        return flash_tree_attention(
            query,
            key_cache,
            value_cache,
            tree,
            self.scale,
            self.vllm_flash_attn_version,
            num_splits=1 if self.batch_invariant_enabled else 0,
        )


class TreeTritonImpl(_TreeAttention, TritonAttentionImpl):
    """Triton attention; context and tree of tree rows by one Triton kernel."""

    def _attend_to_tree(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        tree: TreeAttentionMetadata,
    ) -> torch.Tensor:
        output, _ = tree_attention(
            query,
            key_cache,
            value_cache,
            tree.query_start_loc,
            tree.context_lens,
            tree.block_table,
            tree.ancestors,
            self.scale,
            part="all",
            max_rows=tree.max_rows,
            max_context_len=tree.max_context_len,
            first=tree.first,
        )
        return output


class PictureTritonImpl(PictureAttention, TreeTritonImpl):
    pass


class _NoFullGraphs:
    """A captured graph replays stock kernels and would skip the trees: ask vLLM to run
    attention outside its CUDA graphs (piecewise mode)."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER


class TreeFlashAttentionBuilder(_NoFullGraphs, FlashAttentionMetadataBuilder):
    pass


class TreeTritonBuilder(_NoFullGraphs, TritonAttentionMetadataBuilder):
    pass


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with draft trees."""

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionBuilder]:
        return TreeFlashAttentionBuilder

    @staticmethod
    def for_pictures() -> type[PictureTritonBackend]:
        """Of a layer that does not see the prompt; the caches of both look alike."""
        return PictureTritonBackend


class TreeTritonBackend(TritonAttentionBackend):
    """``TRITON_ATTN`` with draft trees."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonImpl]:
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonBuilder]:
        return TreeTritonBuilder

    @staticmethod
    def for_pictures() -> type[PictureTritonBackend]:
        """Of a layer that does not see the prompt."""
        return PictureTritonBackend


class PictureTritonBackend(TreeTritonBackend):
    """``TRITON_ATTN`` of a branch that does not see the prompt."""

    sees_prompt = False

    @staticmethod
    def get_impl_cls() -> type[PictureTritonImpl]:
        return PictureTritonImpl


def kv_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [num_blocks, block_size, KH, D] of a layer's cache [num_blocks, KH, block_size, 2 D].

    vLLM stores K and V of a token and head side by side, in FLASH_ATTN and TRITON_ATTN alike.
    """
    key_cache, value_cache = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    # With one KV head its stride is arbitrary; FlashAttention 3 and 4 need an aligned one.
    return (
        canonicalize_singleton_dim_strides(key_cache),
        canonicalize_singleton_dim_strides(value_cache),
    )


def compact_kv(kv_cache: torch.Tensor, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
    """Copy K and V of one layer from ``src_slots`` to ``dst_slots``, in place.

    ``kv_cache`` is [num_blocks, KH, block_size, 2 D]; slots are int64 [n] on its device, slot
    ``block * block_size + offset``. The two may overlap: every source is read before the first
    destination is written. Destinations must be distinct. Layers that share one cache tensor
    (``kv_sharing_target_layer_name``) must be compacted once, not once per layer.
    """
    block_size = kv_cache.shape[2]
    slots = kv_cache.transpose(1, 2)
    moved = slots[src_slots // block_size, src_slots % block_size]
    slots[dst_slots // block_size, dst_slots % block_size] = moved
