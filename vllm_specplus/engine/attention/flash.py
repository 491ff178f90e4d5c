"""Tree attention on vLLM's FLASH_ATTN: the context by FlashAttention, the tree by Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_specplus.capabilities import Need
from vllm_specplus.engine.attention.base import TreeAttentionMetadata, tree_backend
from vllm_specplus.engine.attention.cuda import CudaPageCache, CudaTreeAttention, NoFullGraphs
from vllm_specplus.kernels.tree_attention import tree_attention, variants

if TYPE_CHECKING:
    from vllm_specplus.engine.attention.triton import PictureTritonBackend


@tree_backend
class TreeFlashAttentionBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with draft trees."""

    vllm_name = "FLASH_ATTN"
    supports = frozenset((Need.KV_SHARING, Need.PREFIX_LM, Need.VARIABLE_HEADS))
    sees_prompt = True
    divides_metadata = True
    page_cache = CudaPageCache

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        """Name the implementation that attends to trees."""
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionBuilder]:
        """Name the builder that keeps trees out of FULL graphs."""
        return TreeFlashAttentionBuilder

    @staticmethod
    def for_pictures() -> type[PictureTritonBackend]:
        """Return the back end of a layer that does not see the prompt: the caches look alike."""
        from vllm_specplus.engine.attention.triton import PictureTritonBackend

        return PictureTritonBackend


class TreeFlashAttentionBuilder(NoFullGraphs, FlashAttentionMetadataBuilder):
    """The stock builder without FULL graphs."""


class TreeFlashAttentionImpl(CudaTreeAttention, FlashAttentionImpl):
    """The stock implementation, which steps aside for requests with a tree."""

    supports = TreeFlashAttentionBackend.supports

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fa4_hd256:
            raise NotImplementedError(
                "vllm-specplus does not support draft trees with FlashAttention 4 and head size "
                "256, whose kernel needs page-aligned lengths: choose --attention-backend "
                "TRITON_ATTN"
            )

    def _attend_to_tree(
        self,
        layer: Any,
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

    def _warm_up_sizes(self, kv_cache, dtype, max_rows) -> list[tuple[int, int]]:
        rows = variants(self.num_queries_per_kv, self.head_size, dtype.itemsize, max_rows)
        return [(each, 0) for each in rows]


def flash_tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tree: TreeAttentionMetadata,
    scale: float,
    fa_version: int,
    num_splits: int = 0,
) -> torch.Tensor:
    """Return the attention of the tree rows ``query`` [T, H, D].

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
