"""Tree attention on vLLM's CPU back end.

The stock kernel knows no mask but the causal one. Requests with a tree go
through our kernel, the others of the same batch through the stock one.
"""

from __future__ import annotations

import ctypes

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)

from vllm_specplus.engine.attention.base import (
    PictureAttention,
    TreeAttentionMetadata,
    tree_metadata,
)
from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import packed_tree_attention_reference, page_offsets
from vllm_specplus.tree import ancestor_mask


def cache_layout(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Which of our layouts vLLM's cache writer uses for ``isa``.

    Found by writing a page whose every element is distinct and comparing, so a
    future vLLM that packs otherwise is refused instead of misread. Raises
    RuntimeError for an unknown layout.
    """
    number = torch.arange(block_size * head_size)
    read = torch.zeros(2, block_size * head_size, dtype=torch.long)
    # bfloat16 holds integers up to 256 exactly: write the number in 7-bit digits.
    for shift in range(0, int(number[-1]).bit_length(), 7):
        digit = (number >> shift & 127).view(block_size, 1, head_size).to(dtype)
        page = torch.zeros(1, 1, block_size * 2, head_size, dtype=dtype)
        k, v = page.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(digit, digit, k, v, torch.arange(block_size), isa)
        read += torch.stack([k.reshape(-1), v.reshape(-1)]).long() << shift
    for layout in native.LAYOUTS:
        k_at, v_at = page_offsets(layout, block_size, head_size)
        flat = read.view(-1)
        if (flat[k_at].reshape(-1) == number).all() and (flat[v_at].reshape(-1) == number).all():
            return layout
    raise RuntimeError(
        f"vllm-specplus does not know how vLLM packs its CPU KV cache here (isa {isa!r}, {dtype}, "
        f"block size {block_size}, head size {head_size})"
    )


class TreeCPUBackend(CPUAttentionBackend):
    """CPU_ATTN with trees; registered in our worker only."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUImpl]:
        return TreeCPUImpl

    @staticmethod
    def for_pictures() -> type[PictureCPUBackend]:
        """Of a layer that does not see the prompt."""
        return PictureCPUBackend


class TreeCPUImpl(CPUAttentionBackendImpl):
    """The stock implementation, which steps aside for requests with a tree."""

    layout: str | None = None
    _batch: native.TreeBatch | None = None

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None,
    ):  # fmt: skip
        tree = tree_metadata(attn_metadata)
        if tree is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if tree.other_rows is not None:
            q = query.index_select(0, tree.other_rows)
            o = torch.empty_like(q)
            super().forward(layer, q, key, value, kv_cache, tree.other, o)
            output.index_copy_(0, tree.other_rows, o.view(-1, *output.shape[1:]))
        self._tree_forward(layer, query, kv_cache, tree, output)
        return output

    def _tree_forward(self, layer, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        if self._batch is None:
            self._prepare(layer, query, kv_cache, output)
        batch = self._batch
        if batch is None:
            self._reference_forward(query, kv_cache, tree, output)
            return
        batch.num_requests = len(tree.context_lens)
        batch.max_blocks = tree.block_table.stride(0)
        batch.query_stride = query.stride(0)
        batch.output_stride = output.stride(0)
        batch.rows = tree.rows.data_ptr()
        batch.row_start = tree.query_start_loc.data_ptr()
        batch.context = tree.context_lens.data_ptr()
        batch.block_table = tree.block_table.data_ptr()
        batch.parents = tree.parents.data_ptr()
        batch.first = None if tree.first is None else tree.first.data_ptr()
        native.library().specplus_tree_attention(
            ctypes.byref(batch), query.data_ptr(), kv_cache.data_ptr(), output.data_ptr()
        )

    def _prepare(self, layer, query, kv_cache, output) -> None:
        _, heads, block_size, twice = kv_cache.shape
        self.layout = cache_layout(layer.isa, kv_cache.dtype, block_size, twice // 2)
        batch = native.TreeBatch(
            num_query_heads=self.num_heads,
            num_kv_heads=heads,
            head_size=twice // 2,
            block_size=block_size,
            layout=native.LAYOUTS[self.layout],
            dtype=native.DTYPES[kv_cache.dtype],
            scale=self.scale,
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
        )
        same_dtype = query.dtype == kv_cache.dtype == output.dtype
        if same_dtype and native.unsupported(batch) is None:
            self._batch = batch

    def _reference_forward(self, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        heads = (-1, self.num_heads, self.head_size)
        mask = ancestor_mask(tree.parents.numpy(), tree.query_start_loc.numpy(), tree.max_rows)
        packed_tree_attention_reference(
            query.view(heads), kv_cache, output.view(heads),
            rows=tree.rows, query_start_loc=tree.query_start_loc,
            context_lens=tree.context_lens, block_table=tree.block_table,
            ancestors=torch.from_numpy(mask), scale=self.scale, layout=self.layout,
            first=tree.first,
        )  # fmt: skip


class PictureCPUBackend(TreeCPUBackend):
    """CPU_ATTN of a branch that does not see the prompt."""

    sees_prompt = False

    @staticmethod
    def get_impl_cls() -> type[PictureCPUImpl]:
        return PictureCPUImpl


class PictureCPUImpl(PictureAttention, TreeCPUImpl):
    pass
