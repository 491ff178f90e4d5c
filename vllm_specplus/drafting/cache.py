"""The draft's own paged KV cache, by request id.

vLLM's cache manager knows the target's layers only, and EasySpec divides the draft's
layers among devices, so the draft keeps its keys and values itself. A request owns a list
of pages; what is valid in them is a prefix of its text. Nodes of a tree lie behind the
text and are overwritten by the next step, which therefore needs no roll-back: rejected
nodes, preemption and resumption all come down to "how much of this text is cached".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

#: Slots per page.
PAGE = 16


class PageStore:
    """Keys and values of some layers, in pages that somebody else hands out."""

    def __init__(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, pages: int, page: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        """``layers``: numbers of the draft's layers that are held here; ``page``: slots per
        page."""
        shape = (pages, page, kv_heads, head_dim)
        self.pages = pages
        self.keys, self.values = (
            {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
            for layers in [list(layers)] * 2
        )
        self._slots = self._table = None

    def store(
        self, slots: torch.Tensor, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Write keys and values [n, kv_heads, head_dim], layer by layer, at ``slots`` int64
        [n], counted over all pages."""
        stores = zip(self.keys.values(), self.values.values(), strict=True)
        for both, new in zip(stores, layers, strict=True):
            for store, rows in zip(both, new, strict=True):
                store.view(-1, *store.shape[2:])[slots] = rows

    # -- one forward pass -----------------------------------------------------------

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


class PagedCache(PageStore):
    """Pages owned by requests. Page 0 belongs to nobody: padding goes there."""

    def __init__(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, pages: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        if pages < 2:
            raise ValueError(f"a draft cache needs at least 2 pages, not {pages}")
        super().__init__(layers, kv_heads, head_dim, pages, PAGE, dtype, device)
        self._pages: dict[str, list[int]] = {}
        self._texts: dict[str, np.ndarray] = {}
        self._free = list(range(pages - 1, 0, -1))

    def reserve(self, request: str, slots: int) -> bool:
        """Own pages for that many slots; False, and nothing changed, if memory is short."""
        pages = self._pages.setdefault(request, [])
        missing = -(-slots // PAGE) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def release(self, request: str) -> None:
        """The request is gone."""
        self._free.extend(self._pages.pop(request, ()))
        self._texts.pop(request, None)

    def forget_texts(self) -> None:
        """Nothing is valid any more; who owns which pages stays."""
        self._texts.clear()

    def cached(self, request: str, text: np.ndarray) -> int:
        """How many leading tokens of ``text`` int32 [n] have valid keys and values."""
        known = self._texts.get(request)
        if known is None:
            return 0
        size = min(len(known), len(text))
        different = np.flatnonzero(known[:size] != text[:size])
        return int(different[0]) if len(different) else size

    def remember(self, request: str, text: np.ndarray) -> None:
        """All of ``text`` is in the cache now."""
        self._texts[request] = text.copy()

    def table(self, requests: list[str]) -> np.ndarray:
        """int64 [R, pages of the longest] page numbers, padded with 0."""
        rows = [self._pages[name] for name in requests]
        table = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table
