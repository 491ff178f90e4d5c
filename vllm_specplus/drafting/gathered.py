"""Pages whose keys and values a pass gathers, for attention that our tree kernels do not compute.

A row of theirs sees its text and its ancestors. The rows of a block (``block_executor.py``) see
each other, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class GatheredPages:
    """Keys and values of some layers, in pages that somebody else hands out."""

    def __init__(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, pages: int, page: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        """``layers``: numbers of the head's layers; ``page``: slots per page."""
        shape = (pages, page, kv_heads, head_dim)
        self.keys, self.values = (
            {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
            for layers in [list(layers)] * 2
        )
        self._slots = self._table = torch.empty(0, dtype=torch.int64, device=device)

    def store(
        self, slots: torch.Tensor, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Write keys and values [n, kv_heads, head_dim], layer by layer, at ``slots`` int64
        [n], counted over all pages."""
        stores = zip(self.keys.values(), self.values.values(), strict=True)
        for both, new in zip(stores, layers, strict=True):
            for store, rows in zip(both, new, strict=True):
                store.view(-1, *store.shape[2:])[slots] = rows

    def begin_pass(self, slots: torch.Tensor, table: torch.Tensor) -> None:
        """The coming :meth:`update` calls write at ``slots`` int64 [R, n], counted over all
        pages, and read the pages of ``table`` int64 [R, P]."""
        self._slots, self._table = slots.reshape(-1), table

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__):
        """Write [R, kv_heads, n, head_dim]; return all the pass may see, in the same
        layout with the slots of P pages. (The call transformers' attention makes.)"""
        return self._swap(self.keys[layer], keys), self._swap(self.values[layer], values)

    def _swap(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        pages, page, heads, dim = store.shape
        flat = store.view(pages * page, heads, dim)
        flat[self._slots] = new.transpose(1, 2).reshape(-1, heads, dim)
        requests, width = self._table.shape
        seen = store.view(pages, -1).index_select(0, self._table.reshape(-1))
        return seen.view(requests, width * page, heads, dim).transpose(1, 2)
