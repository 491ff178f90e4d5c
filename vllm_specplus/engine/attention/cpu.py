"""Tree attention on vLLM's CPU back end.

The stock kernel knows no mask but the causal one. Requests with a tree go through our kernel, the
others of the same batch through the stock one. Pages are packed for vLLM's kernels, in a way that
depends on data type, sizes and processor (``layer.isa``).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)

from vllm_specplus.capabilities import Need
from vllm_specplus.drafting.context_pages import PackedPages
from vllm_specplus.engine.attention.base import (
    PageCache,
    PictureAttention,
    TreeAttention,
    TreeAttentionMetadata,
    chunk_of,
    common_block_size,
    distinct,
    tree_backend,
)
from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import (
    move_slots_reference,
    packed_tree_attention_reference,
    page_offsets,
)
from vllm_specplus.tree import ancestor_mask


@functools.cache
def cache_layout(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int, fp8: str | None = None
) -> str:
    """Return which of our layouts vLLM's cache writer uses for ``isa``; ``fp8``: vLLM's name of
    what the bytes of a cache are.

    Found by writing a page whose every element is distinct and comparing, so a
    future vLLM that packs otherwise is refused instead of misread. Raises
    RuntimeError for an unknown layout.
    """
    number = torch.arange(block_size * head_size)
    read = torch.zeros(2, block_size * head_size, dtype=torch.long)
    # bfloat16 holds integers up to 256 exactly, 8 bits up to 8: write the number in small digits.
    bits, digits = (7, dtype) if fp8 is None else (3, torch.bfloat16)
    for shift in range(0, int(number[-1]).bit_length(), bits):
        digit = (number >> shift & (1 << bits) - 1).view(block_size, 1, head_size).to(digits)
        page = torch.zeros(1, 1, block_size * 2, head_size, dtype=dtype)
        k, v = page.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            digit, digit, k, v, torch.arange(block_size), isa, kv_cache_dtype=fp8 or "auto"
        )
        written = torch.stack([k.reshape(-1), v.reshape(-1)])
        if fp8 is not None:
            written = written.view(native.FP8[fp8][1]).float()
        read += written.long() << shift
    for layout in native.LAYOUTS:
        k_at, v_at = page_offsets(layout, block_size, head_size)
        flat = read.view(-1)
        if (flat[k_at].reshape(-1) == number).all() and (flat[v_at].reshape(-1) == number).all():
            return layout
    raise RuntimeError(
        f"vllm-specplus does not know how vLLM packs its CPU KV cache here (isa {isa!r}, {dtype}, "
        f"block size {block_size}, head size {head_size})"
    )


@dataclass(frozen=True)
class PagesOf:
    """How one cache [pages, kv_heads, block_size, 2 * head_dim] lies in memory; strides count
    elements."""

    layout: str
    dtype: torch.dtype
    fp8: str | None
    """vLLM's name of what bytes are, None: the cache holds ``dtype``."""
    heads: int
    block_size: int
    head_size: int
    page_stride: int
    head_stride: int

    @classmethod
    def layer(cls, layer: Any) -> PagesOf:
        """Describe the cache that is bound to an attention layer."""
        cache = layer.kv_cache
        _, heads, block_size, twice = cache.shape
        fp8 = layer.impl.kv_cache_dtype if cache.dtype == torch.uint8 else None
        layout = cache_layout(layer.isa, cache.dtype, block_size, twice // 2, fp8)
        strides = cache.stride(0), cache.stride(1)
        return cls(layout, cache.dtype, fp8, heads, block_size, twice // 2, *strides)

    def batch(self) -> native.TreeBatch:
        """Return the C++ kernels' description of such pages."""
        code = native.DTYPES[self.dtype] if self.fp8 is None else native.FP8[self.fp8][0]
        return native.TreeBatch(
            num_kv_heads=self.heads,
            head_size=self.head_size,
            value_size=self.head_size,
            block_size=self.block_size,
            layout=native.LAYOUTS[self.layout],
            dtype=code,
            cache_dtype=code,
            value_scale=1.0,
            page_stride=self.page_stride,
            head_stride=self.head_stride,
        )


class CpuPageCache(PageCache):
    """Packed pages; layers whose caches lie alike are moved by one call."""

    def __init__(self, layers: Sequence[Any]):
        self.block_size = common_block_size([layer.kv_cache for layer in layers])
        self._layers = [(layer.kv_cache, PagesOf.layer(layer)) for layer in layers]
        alike: dict[PagesOf, list[torch.Tensor]] = {}
        for cache, pages in self._layers:
            alike.setdefault(pages, []).append(cache)
        self._alike = {pages: distinct(caches) for pages, caches in alike.items()}
        self._calls = [
            (pages.batch(), (ctypes.c_void_p * len(caches))(*(c.data_ptr() for c in caches)))
            for pages, caches in self._alike.items()
        ]

    def move(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Copy slots, as :meth:`PageCache.move`: all layers in one call, if they lie alike."""
        lib = native.library()
        if lib is None:
            where = torch.from_numpy(src), torch.from_numpy(dst)
            for pages, caches in self._alike.items():
                for cache in caches:
                    move_slots_reference(cache, *where, pages.layout)
            return
        for batch, pointers in self._calls:
            lib.specplus_move_slots(
                ctypes.byref(batch), pointers, len(pointers),
                src.ctypes.data, dst.ctypes.data, len(src),
            )  # fmt: skip

    def read(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield keys and values, as :meth:`PageCache.read`."""
        tokens = torch.from_numpy(slots)
        page, place = tokens // self.block_size, tokens % self.block_size
        # Where the elements are is computed once for caches that lie alike.
        where: dict[PagesOf, tuple[torch.Tensor, ...]] = {}
        for cache, pages in self._layers:
            if pages not in where:
                heads = torch.arange(pages.heads) * pages.head_stride
                head = (page[:, None] * pages.page_stride + heads)[..., None]
                offsets = page_offsets(pages.layout, pages.block_size, pages.head_size)
                where[pages] = tuple(head + table[place][:, None] for table in offsets)
            key_at, value_at = where[pages]
            begin = cache.storage_offset()
            length = cache.untyped_storage().nbytes() // cache.itemsize - begin
            flat = cache.as_strided((length,), (1,), begin)
            yield flat[key_at], flat[value_at]

    @staticmethod
    def context_pages(layer: Any) -> PackedPages:
        """Describe the pages, as :meth:`PageCache.context_pages`."""
        pages = PagesOf.layer(layer)
        return PackedPages(layer.kv_cache, pages.layout, pages.batch())

    def warm_up(self) -> None:
        """Build and load the C++ kernels."""
        native.library()


@tree_backend
class TreeCPUBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with draft trees."""

    vllm_name = "CPU_ATTN"
    supports = frozenset(
        (
            Need.ALIBI,
            Need.ATTENTION_SINKS,
            Need.CHUNKED_ATTENTION,
            Need.FP8_KV,
            Need.KV_SHARING,
            Need.LOGITS_SOFT_CAP,
            Need.PREFIX_LM,
            Need.SLIDING_WINDOW,
            Need.VARIABLE_HEADS,
        )
    )
    sees_prompt = True
    divides_metadata = True
    page_cache = CpuPageCache

    @staticmethod
    def get_impl_cls() -> type[TreeCPUImpl]:
        """Name the implementation that attends to trees."""
        return TreeCPUImpl

    @staticmethod
    def for_pictures() -> type[PictureCPUBackend]:
        """Return the back end of a layer that does not see the prompt."""
        return PictureCPUBackend


class TreeCPUImpl(TreeAttention, CPUAttentionBackendImpl):
    """The stock implementation, which steps aside for requests with a tree."""

    supports = TreeCPUBackend.supports
    layout: str | None = None
    _pages: PagesOf
    _batch: native.TreeBatch | None = None

    def _tree_forward(self, layer, query, kv_cache, tree: TreeAttentionMetadata, output) -> None:
        if self.layout is None:
            self._prepare(layer, query, kv_cache, output)
        batch = self._batch
        if batch is None:
            self._reference_forward(layer, query, kv_cache, tree, output)
            return
        if self._pages.fp8 is not None:  # scales may be measured by the first prompt
            batch.scale = self.scale * layer._k_scale_float
            batch.value_scale = layer._v_scale_float
        batch.num_requests = len(tree.context_lens)
        batch.max_blocks = tree.block_table.stride(0)
        batch.query_stride = query.stride(0)
        batch.output_stride = output.stride(0)
        batch.rows = tree.rows.data_ptr()
        batch.row_start = tree.query_start_loc.data_ptr()
        batch.context = tree.context_lens.data_ptr()
        batch.block_table = tree.block_table.data_ptr()
        batch.parents = tree.parents.data_ptr()
        batch.depths = None if tree.depths is None else tree.depths.data_ptr()
        batch.first = None if tree.first is None else tree.first.data_ptr()
        native.library().specplus_tree_attention(
            ctypes.byref(batch), query.data_ptr(), kv_cache.data_ptr(), output.data_ptr()
        )

    def _prepare(self, layer, query, kv_cache, output) -> None:
        self._pages = pages = PagesOf.layer(layer)
        self.layout = pages.layout
        batch = pages.batch()
        batch.dtype = native.DTYPES.get(query.dtype, -1)
        batch.num_query_heads = self.num_heads
        batch.scale = self.scale
        batch.soft_cap = self.logits_soft_cap
        batch.window, batch.chunk = max(self.sliding_window, 0), chunk_of(layer)
        # Kept: the kernel reads them wherever they are.
        self._by_head = [
            None if each is None else each.to(torch.float32).contiguous()
            for each in (self.alibi_slopes, self.sinks)
        ]
        batch.slopes, batch.sinks = (
            None if each is None else each.data_ptr() for each in self._by_head
        )
        same_dtype = query.dtype == output.dtype
        if pages.fp8 is None:
            same_dtype &= query.dtype == kv_cache.dtype
        if same_dtype and native.unsupported(batch) is None:
            self._batch = batch

    def _reference_forward(self, layer, query, kv_cache, tree, output) -> None:
        fp8, scale, value_scale = None, self.scale, 1.0
        if self._pages.fp8 is not None:
            fp8 = native.FP8[self._pages.fp8][1]
            scale, value_scale = scale * layer._k_scale_float, layer._v_scale_float
        heads = (-1, self.num_heads, self.head_size)
        mask = ancestor_mask(tree.parents.numpy(), tree.query_start_loc.numpy(), tree.max_rows)
        packed_tree_attention_reference(
            query.view(heads), kv_cache, output.view(heads),
            rows=tree.rows, query_start_loc=tree.query_start_loc,
            context_lens=tree.context_lens, block_table=tree.block_table,
            ancestors=torch.from_numpy(mask), scale=scale, layout=self.layout,
            fp8=fp8, value_scale=value_scale,
            depths=tree.depths, first=tree.first, window=max(self.sliding_window, 0),
            chunk=chunk_of(layer), soft_cap=self.logits_soft_cap, slopes=self._by_head[0],
            sinks=self._by_head[1],
        )  # fmt: skip

    def forget_weights(self) -> None:
        """Take the sinks anew."""
        self.layout = self._batch = None

    def warm_up(self, layer: Any, dtype: torch.dtype, max_rows: int) -> None:
        """Build and load the C++ kernels."""
        native.library()


@tree_backend
class PictureCPUBackend(TreeCPUBackend):
    """``CPU_ATTN`` of a branch that does not see the prompt."""

    # Its rows have no positions of their own.
    supports = frozenset((Need.KV_SHARING, Need.PREFIX_LM, Need.VARIABLE_HEADS))
    sees_prompt = False

    @staticmethod
    def get_impl_cls() -> type[PictureCPUImpl]:
        """Name the implementation that attends to pictures only."""
        return PictureCPUImpl


class PictureCPUImpl(PictureAttention, TreeCPUImpl):
    """CPU attention of a branch that does not see the prompt."""

    supports = PictureCPUBackend.supports
