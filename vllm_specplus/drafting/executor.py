"""Forward passes of a draft model over the batch: the new text, then tree levels.

A round of drafting::

    begin   the tokens each text gained since the last round, exactly; logits behind it
    grow    one level of tree nodes, for every request; logits behind each node
    grow    ...

The accepted nodes of the last round are read again as text. That costs a few more rows in
the first pass, and needs no bookkeeping of which node ended where; a layer-parallel draft
(EasySpec) must do so anyway, since its nodes' keys and values are approximate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from vllm_specplus.drafting.cache import PAGE, PagedCache, PageStore
from vllm_specplus.drafting.graphs import LevelGraphs, Record
from vllm_specplus.drafting.model import LayeredModel

#: A text with more news than this, a prompt, is read by itself, so many tokens at a time.
PROMPT_ROWS, PROMPT_CHUNK = 32, 256


class TreeExecutor(ABC):
    """Grows the trees of a round behind texts whose keys and values are in ``cache``."""

    def __init__(self, model: LayeredModel, cache: PageStore, page: int, max_nodes: int):
        """``page``: slots per page of ``cache``; ``max_nodes``: of one request's tree."""
        self.model = model
        self.cache = cache
        self.max_nodes = max_nodes
        self._page = page

    def _start_trees(
        self, lengths: torch.Tensor, table: torch.Tensor, first_slots: torch.Tensor,
        text: torch.Tensor,
    ) -> None:  # fmt: skip
        """Of R requests: ``lengths`` int64 [R] rows of their texts; ``table`` int64 [R, P]
        their pages; ``first_slots`` int64 [R] where, in the slots of these, the nodes go;
        ``text`` bool [R, slots] which of them hold text."""
        self._length, self._table, self._first_slot, self._text = lengths, table, first_slots, text
        device = self.model.device
        size = (len(lengths), self.max_nodes, self.max_nodes)
        self._ancestors = torch.zeros(size, dtype=torch.bool, device=device)
        self._depth = torch.zeros(size[:2], dtype=torch.int64, device=device)
        self._nodes = 0

    @torch.inference_mode()
    def grow(
        self, active: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
    ) -> torch.Tensor:
        """Add a level of ``w`` nodes to some of the trees; float32 [A, w, V] logits.

        ``active`` int64 [A] which requests of the round, always among the active ones of
        the level before; ``tokens`` int64 [A, w]; ``parents`` int64 [A, w] nodes in the
        order they were added, -1 for the text's last token.
        """
        count, width = tokens.shape
        first, self._nodes = self._nodes, self._nodes + width
        row = active[:, None]
        top = parents.clamp(min=0)
        below_root = parents < 0
        ancestors = self._ancestors[row, top] & ~below_root[..., None]
        own = torch.arange(first, first + width, device=tokens.device)
        ancestors[:, torch.arange(width, device=tokens.device), own] = True
        depth = torch.where(below_root, 0, self._depth[row, top] + 1)
        self._ancestors[row, own] = ancestors
        self._depth[row, own] = depth

        table, first_slot = self._table[active], self._first_slot[active][:, None]
        cached_at = first_slot + own
        slots = table.gather(1, cached_at // self._page) * self._page + cached_at % self._page
        seen = torch.arange(table.shape[1] * self._page, device=tokens.device)
        node = seen - first_slot  # [A, S]: which node a slot holds, if it holds one
        is_node = (node >= 0) & (node < self._nodes)
        index = node.clamp(0, self.max_nodes - 1)[:, None].expand(count, width, len(seen))
        text = self._text[active][:, None]
        mask = torch.where(is_node[:, None], ancestors.gather(2, index), text)
        positions = self._length[active][:, None] + depth
        return self.model.logits(
            self._level(active, own, parents, tokens, positions, slots, table, mask)
        )

    @abstractmethod
    def _level(
        self, active: torch.Tensor, own: torch.Tensor, parents: torch.Tensor,
        tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
        table: torch.Tensor, mask: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [A, w, d] of the nodes ``own`` int64 [w]; see :meth:`grow` and
        ``DraftExecutor._forward`` for the rest."""

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)


class DraftExecutor(TreeExecutor):
    """Runs ``model`` for all requests of a step; holds their KV cache."""

    cache: PagedCache

    def __init__(
        self, model: LayeredModel, max_slots: int, max_nodes: int, record: Record | None = None
    ):
        """``max_slots``: tokens and nodes the cache can hold, over all requests;
        ``max_nodes``: of one request's tree; ``record``: makes graphs of levels."""
        pages = 1 + -(-max_slots // PAGE)
        cache = PagedCache(
            model.attention_layers, model.kv_heads, model.head_dim, pages, model.dtype, model.device
        )
        super().__init__(model, cache, PAGE, max_nodes)
        self._level_layers = LevelGraphs(self._layers, PAGE, record) if record else self._layers

    def forget(self, request: str) -> None:
        self.cache.release(request)

    # -- text -------------------------------------------------------------------------

    def room(self, request: str, length: int) -> bool:
        """Can a text of ``length`` tokens and its tree be held? Reserves the pages."""
        reach = length + self.max_nodes
        return reach <= self.model.max_positions and self.cache.reserve(request, reach)

    @torch.inference_mode()
    def begin(
        self, requests: list[str], texts: list[np.ndarray], versions: list[int] | None = None
    ) -> torch.Tensor:
        """Bring the cache up to each text; float32 [R, V] logits behind their last tokens.

        ``texts``: int32 [n] each, n >= 1, of requests that have :meth:`room`; ``versions`` [R] as
        ``StepContext.versions``.
        """
        known = []
        of_version = versions or [None] * len(texts)
        for name, text, version in zip(requests, texts, of_version, strict=True):
            # The last token is always read, for its logits.
            done = min(self.cache.cached(name, text, version), len(text) - 1)
            while len(text) - done > PROMPT_ROWS:
                end = min(done + PROMPT_CHUNK, len(text) - 1)
                self._read([name], [text[done:end]], [done])
                done = end
            known.append(done)
        news = [text[done:] for text, done in zip(texts, known, strict=True)]
        hidden = self._read(requests, news, known)
        for name, text, version in zip(requests, texts, of_version, strict=True):
            self.cache.remember(name, text, version)
        lengths = torch.tensor([len(text) for text in texts], device=hidden.device)
        table = self._to_device(self.cache.table(requests))
        seen = torch.arange(table.shape[1] * PAGE, device=hidden.device)
        self._start_trees(lengths, table, lengths, seen < lengths[:, None])
        last = torch.tensor([len(new) - 1 for new in news], device=hidden.device)
        return self.model.logits(hidden[torch.arange(len(news), device=hidden.device), last])

    def _read(self, requests: list[str], news: list[np.ndarray], starts: list[int]) -> torch.Tensor:
        """One exact pass over ``news`` behind positions ``starts``; hidden [R, widest, d]."""
        width = max(map(len, news))
        tokens = np.zeros((len(news), width), np.int64)
        # Padding sits at position 0, writes to page 0 and is never read.
        positions = np.zeros_like(tokens)
        slots = np.zeros_like(tokens)
        table = self.cache.table(requests)
        for r, (new, start) in enumerate(zip(news, starts, strict=True)):
            here = np.arange(start, start + len(new))
            tokens[r, : len(new)] = new
            positions[r, : len(new)] = here
            slots[r, : len(new)] = table[r, here // PAGE] * PAGE + here % PAGE
        reach = -(-int(positions.max() + 1) // PAGE)
        table = self._to_device(table[:, :reach])
        positions = self._to_device(positions)
        seen = torch.arange(reach * PAGE, device=positions.device)
        mask = seen <= positions[..., None]
        return self._forward(
            self._to_device(tokens), positions, self._to_device(slots), table, mask, exact=True
        )

    # -- layers -------------------------------------------------------------------------

    def _level(self, active, own, parents, tokens, positions, slots, table, mask):
        return self._forward(tokens, positions, slots, table, mask, exact=False)

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
        table: torch.Tensor, mask: torch.Tensor, exact: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [R, n, d] of the last layer.

        ``tokens``, ``positions``, ``slots`` int64 [R, n]; ``table`` int64 [R, P]; ``mask``
        bool [R, n, P * PAGE], which slots a row may see, its own among them; ``exact``: the
        rows are text. (Only a layer-parallel draft treats nodes otherwise.)
        """
        # Outside of graphs: some variants look at the positions' values.
        cos, sin = self.model.rotary(positions)
        layers = self._layers if exact else self._level_layers
        return layers(tokens, cos, sin, slots, table, mask)

    def _layers(
        self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor,
        table: torch.Tensor, mask: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As :meth:`_forward`; ``cos``, ``sin`` [R, n, head_dim] of the positions."""
        model = self.model
        self.cache.begin_pass(slots, table)
        hidden, rotary, mask = model.embed(tokens), (cos, sin), mask[:, None]
        for layer in range(model.num_layers):
            hidden = hidden + model.attention(layer, hidden, rotary, mask, self.cache)
            hidden = hidden + model.mlp(layer, hidden)
        return hidden
