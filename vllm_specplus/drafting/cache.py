"""The draft's own paged KV cache, by request id.

vLLM's cache manager knows the target's layers only, and EasySpec divides the draft's
layers among devices, so the draft keeps its keys and values itself. A request owns a list
of pages; what is valid in them is a prefix of its text. Nodes of a tree lie behind the
text and are overwritten by the next step, which therefore needs no roll-back: rejected
nodes, preemption and resumption all come down to "how much of this text is cached". Texts are
compared only where they may have changed, which their version tells.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_specplus.kernels import native
from vllm_specplus.kernels.reference import page_offsets

#: Slots per page.
PAGE = 16

#: Of packed pages: that of AMX is for matrix products of more rows than a level has.
_LAYOUT = "vec"

_NO_PAGES = np.empty(0, np.int32)


def _alike(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Do keys and values [n, kv_heads, head_dim] lie in memory as the CPU kernels take them?"""
    _, _, size = keys.shape
    return keys.stride() == values.stride() and keys.stride()[1:] == (size, 1)


class PageStore:
    """Keys and values of some layers, in pages that somebody else hands out.

    On a CPU they are *packed* as its kernels read them (``kernels/cpu``), one tensor per layer
    [pages, kv_heads, 2 * page * head_dim]; elsewhere, or where the kernels cannot serve such
    pages, keys and values are apart, [pages, page, kv_heads, head_dim] each.
    """

    def __init__(
        self, layers: Iterable[int], kv_heads: int, head_dim: int, pages: int, page: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        """``layers``: numbers of the draft's layers that are held here; ``page``: slots per
        page."""
        self.layers = list(layers)
        self.pages, self.page, self.device = pages, page, device
        self._kv_heads, self._head_dim, self.dtype = kv_heads, head_dim, dtype
        self._batch = self.batch() if dtype in native.DTYPES else None
        self.packed = (
            device.type == "cpu"
            and self._batch is not None
            and native.unsupported(self._batch) is None
        )
        shape: tuple[int, ...] = (2, pages, page, kv_heads, head_dim)
        if self.packed:
            shape = (pages, kv_heads, 2 * page * head_dim)
        self._held = {
            layer: torch.zeros(shape, dtype=dtype, device=device) for layer in self.layers
        }

    def batch(self) -> native.TreeBatch:
        """Return the CPU kernels' description of packed pages."""
        both = 2 * self.page * self._head_dim
        code = native.DTYPES[self.dtype]
        return native.TreeBatch(
            num_kv_heads=self._kv_heads, head_size=self._head_dim, value_size=self._head_dim,
            block_size=self.page, layout=native.LAYOUTS[_LAYOUT], dtype=code, cache_dtype=code,
            value_scale=1.0, page_stride=self._kv_heads * both, head_stride=both,
        )  # fmt: skip

    def pages_of(self, layer: int) -> torch.Tensor:
        """Return keys and values [2, pages, page, kv_heads, head_dim] of pages that are not
        packed."""
        return self._held[layer]

    def packed_pages(self, layer: int) -> torch.Tensor:
        """Return the packed pages of a layer."""
        return self._held[layer]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write keys and values [n, kv_heads, head_dim] at ``slots`` int64 [n], counted over all
        pages."""
        if self.packed:
            if not _alike(keys, values):
                keys, values = keys.contiguous(), values.contiguous()
            native.library().specplus_store_slots(
                ctypes.byref(self._batch), self._held[layer].data_ptr(), keys.data_ptr(),
                values.data_ptr(), keys.stride(0), slots.data_ptr(), len(slots),
            )  # fmt: skip
            return
        for store, rows in zip(self._held[layer], (keys, values), strict=True):
            store.view(-1, *store.shape[2:])[slots] = rows

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [n, kv_heads, head_dim] at ``slots`` int64 [n]."""
        if not self.packed:
            keys, values = (each.flatten(0, 1)[slots] for each in self._held[layer])
            return keys, values
        page, place = slots // self.page, slots % self.page
        offsets = page_offsets(_LAYOUT, self.page, self._head_dim)
        keys, values = (
            self._held[layer][page].gather(2, table[place][:, None].expand(-1, self._kv_heads, -1))
            for table in offsets
        )
        return keys, values

    def store(
        self, slots: torch.Tensor, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Write keys and values [n, kv_heads, head_dim], layer by layer, at ``slots`` int64
        [n]."""
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            self.write(layer, slots, keys, values)


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
        # Request -> its pages int32, and how many of them are owned: the array may be longer.
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
                longer = np.empty(max(wanted, 2 * len(pages)), np.int32)
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
        """int32 [R, pages of the longest] page numbers, padded with 0."""
        rows = [self._pages[name] for name in requests]
        table = np.zeros((len(rows), max(owned for _, owned in rows)), np.int32)
        for row, (pages, owned) in zip(table, rows, strict=True):
            row[:owned] = pages[:owned]
        return table
