"""The draft's own paged KV cache, by request id.

vLLM's cache manager knows the target's layers only, and EasySpec divides the draft's
layers among devices, so the draft keeps its keys and values itself. A request owns a list
of pages; what is valid in them is a prefix of its text. Nodes of a tree lie behind the
text and are overwritten by the next step, which therefore needs no roll-back: rejected
nodes, preemption and resumption all come down to "how much of this text is cached". Texts are
compared only where they may have changed, which their version tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

#: Slots per page.
PAGE = 16

_NO_PAGES = np.empty(0, np.int64)


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


@dataclass(slots=True)
class _Text:
    """A text that is in the cache."""

    version: int | None = None
    size: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.empty(PAGE, np.int32))
    """int32, the first ``size`` of them."""

    def follow(self, text: np.ndarray, version: int | None) -> None:
        """Become ``text``; what is here of the same version is not copied again."""
        same = self.size if version is not None and version == self.version else 0
        if len(self.tokens) < len(text):
            longer = np.empty(max(len(text), 2 * len(self.tokens)), np.int32)
            longer[:same] = self.tokens[:same]
            self.tokens = longer
        self.tokens[same : len(text)] = text[same:]
        self.version, self.size = version, len(text)


class PagedCache(PageStore):
    """Pages owned by requests. Page 0 belongs to nobody: padding goes there."""

    def __init__(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, pages: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        if pages < 2:
            raise ValueError(f"a draft cache needs at least 2 pages, not {pages}")
        super().__init__(layers, kv_heads, head_dim, pages, PAGE, dtype, device)
        # Request -> its pages int64, and how many of them are owned: the array may be longer.
        self._pages: dict[str, tuple[np.ndarray, int]] = {}
        self._texts: dict[str, _Text] = {}
        self._free = list(range(pages - 1, 0, -1))

    def reserve(self, request: str, slots: int) -> bool:
        """Own pages for that many slots; False, and nothing changed, if memory is short."""
        pages, owned = self._pages.get(request, (_NO_PAGES, 0))
        wanted = -(-slots // PAGE)
        missing = wanted - owned
        if missing > len(self._free):
            return False
        if missing > 0:
            if wanted > len(pages):
                longer = np.empty(max(wanted, 2 * len(pages)), np.int64)
                longer[:owned] = pages[:owned]
                pages = longer
            pages[owned:wanted] = self._free[-1 : -missing - 1 : -1]
            del self._free[-missing:]
            self._pages[request] = pages, wanted
        return True

    def release(self, request: str) -> None:
        """The request is gone."""
        pages, owned = self._pages.pop(request, (_NO_PAGES, 0))
        self._free.extend(pages[:owned].tolist())
        self._texts.pop(request, None)

    def forget_texts(self) -> None:
        """Nothing is valid any more; who owns which pages stays."""
        self._texts.clear()

    def cached(self, request: str, text: np.ndarray, version: int | None = None) -> int:
        """How many leading tokens of ``text`` int32 [n] have valid keys and values.

        Texts of one ``version`` (``StepContext.versions``) only grow, and need no comparison."""
        known = self._texts.get(request)
        if known is None:
            return 0
        size = min(known.size, len(text))
        if version is not None and version == known.version:
            return size
        different = np.flatnonzero(known.tokens[:size] != text[:size])
        return int(different[0]) if len(different) else size

    def remember(self, request: str, text: np.ndarray, version: int | None = None) -> None:
        """All of ``text``, of this ``version``, is in the cache now."""
        self._texts.setdefault(request, _Text()).follow(text, version)

    def table(self, requests: list[str]) -> np.ndarray:
        """int64 [R, pages of the longest] page numbers, padded with 0."""
        rows = [self._pages[name] for name in requests]
        table = np.zeros((len(rows), max(owned for _, owned in rows)), np.int64)
        for row, (pages, owned) in zip(table, rows, strict=True):
            row[:owned] = pages[:owned]
        return table
