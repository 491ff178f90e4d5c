"""Tree attention on vLLM's TRITON_ATTN: context and tree of a tree row by one Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_specplus.capabilities import Need
from vllm_specplus.engine.attention.base import (
    PictureAttention,
    TreeAttentionMetadata,
    chunk_of,
    tree_backend,
)
from vllm_specplus.engine.attention.cuda import CudaPageCache, CudaTreeAttention, NoFullGraphs
from vllm_specplus.kernels.tree_attention import MIN_SPLIT_TOKENS, tree_attention, variants

#: Tokens of a context that is divided among several programs.
LONG_CONTEXT = 2 * MIN_SPLIT_TOKENS


@tree_backend
class TreeTritonBackend(TritonAttentionBackend):
    """``TRITON_ATTN`` with draft trees."""

    vllm_name = "TRITON_ATTN"
    supports = frozenset(
        (
            Need.ALIBI,
            Need.ATTENTION_SINKS,
            Need.CHUNKED_ATTENTION,
            Need.KV_SHARING,
            Need.LOGITS_SOFT_CAP,
            Need.PREFIX_LM,
            Need.SLIDING_WINDOW,
            Need.VARIABLE_HEADS,
        )
    )
    sees_prompt = True
    divides_metadata = True
    page_cache = CudaPageCache

    @staticmethod
    def get_impl_cls() -> type[TreeTritonImpl]:
        """Name the implementation that attends to trees."""
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonBuilder]:
        """Name the builder that keeps trees out of FULL graphs."""
        return TreeTritonBuilder

    @staticmethod
    def for_pictures() -> type[PictureTritonBackend]:
        """Return the back end of a layer that does not see the prompt."""
        return PictureTritonBackend


class TreeTritonBuilder(NoFullGraphs, TritonAttentionMetadataBuilder):
    """The stock builder without FULL graphs."""


class TreeTritonImpl(CudaTreeAttention, TritonAttentionImpl):
    """The stock implementation, which steps aside for requests with a tree."""

    supports = TreeTritonBackend.supports

    def _attend_to_tree(
        self,
        layer: Any,
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
            depths=tree.depths,
            window=self.sliding_window[0] + 1,
            chunk=chunk_of(layer),
            soft_cap=self.logits_soft_cap,
            slopes=self.alibi_slopes,
            sinks=self.sinks,
        )
        return output

    def features(self, layer: Any) -> tuple:
        """Return the window, the chunk, and which of soft cap, slopes and sinks there are."""
        return (
            self.sliding_window[0], chunk_of(layer), self.logits_soft_cap > 0,
            self.alibi_slopes is not None, self.sinks is not None,
        )  # fmt: skip

    def _warm_up_sizes(self, kv_cache, dtype, max_rows) -> list[tuple[int, int]]:
        rows = variants(self.num_queries_per_kv, self.head_size, dtype.itemsize, max_rows)
        # Without a context, and with one long enough to be divided.
        return [(each, context) for each in rows for context in (0, LONG_CONTEXT)]


@tree_backend
class PictureTritonBackend(TreeTritonBackend):
    """``TRITON_ATTN`` of a branch that does not see the prompt."""

    # Its rows have no positions of their own.
    supports = frozenset((Need.KV_SHARING, Need.PREFIX_LM, Need.VARIABLE_HEADS))
    sees_prompt = False

    @staticmethod
    def get_impl_cls() -> type[PictureTritonImpl]:
        """Name the implementation that attends to pictures only."""
        return PictureTritonImpl


class PictureTritonImpl(PictureAttention, TreeTritonImpl):
    """Triton attention of a branch that does not see the prompt."""

    supports = PictureTritonBackend.supports

    def _chain(self, rows: int, context: int, keys: torch.Tensor) -> TreeAttentionMetadata:
        tree = super()._chain(rows, context, keys)
        tree.first = torch.zeros_like(tree.context_lens)
        return tree
