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

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from vllm_specplus.drafting.cache import PAGE, PagedCache, PageStore
from vllm_specplus.drafting.graphs import LevelGraphs, Record
from vllm_specplus.drafting.growth import Growth
from vllm_specplus.drafting.model import LayeredModel
from vllm_specplus.drafting.passes import PagedAttention, Rows

#: Rows of text that are read in one pass.
PROMPT_CHUNK = 256
#: Slots of a context that several programs of a GPU share.
LONG_CONTEXT = 1024


class TreeExecutor(ABC):
    """Grows the trees of a round behind texts whose keys and values are in ``cache``."""

    def __init__(self, model: LayeredModel, cache: PageStore, max_nodes: int):
        """``max_nodes``: of one request's tree."""
        self.model = model
        self.cache = cache
        self.max_nodes = max_nodes
        self.graphs: LevelGraphs | None = None
        self.read_last: torch.Tensor | None = None
        """[A * w, d] hidden states of the nodes that were added last, before the last norm."""

    @torch.inference_mode()
    def warm_up(self, widths: Iterable[int], max_requests: int) -> None:
        """Compile and record what serving should not wait for: passes over text, and levels of
        these ``widths``, of up to ``max_requests`` requests."""
        device = self.cache.device
        table = np.zeros((1, -(-(LONG_CONTEXT + PROMPT_CHUNK) // self.cache.page)), np.int32)
        if device.type != "cpu":  # one more variant of the kernel at most between powers of two
            sizes = [1 << power for power in range(PROMPT_CHUNK.bit_length())]
            for first, size in itertools.product((0, LONG_CONTEXT), sizes):
                if first + size <= self.model.max_positions:
                    self._try(Rows.of_text(self.cache, table, [(first, first + size)]))
        if self.graphs is not None:
            like = self._inputs(Rows.of_text(self.cache, table, [(0, 1)]))
            self.graphs.record(widths, max_requests, like)

    @abstractmethod
    def _try(self, rows: Rows) -> None:
        """Run a pass over ``rows`` of text that lie in page 0, which is nobody's."""

    @abstractmethod
    def _inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        """What ``graphs`` are called with beside ``rows``."""

    def _start_trees(
        self, lengths: torch.Tensor, table: torch.Tensor, first_slots: torch.Tensor, reach: int
    ) -> None:
        """See :class:`Growth`."""
        self.trees = Growth(self.cache, self.max_nodes, lengths, table, first_slots, reach)

    @torch.inference_mode()
    def grow(
        self, active: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor,
        generations: int = 1,
    ) -> torch.Tensor:  # fmt: skip
        """Add a level of ``w`` nodes to some of the trees; float32 [A, w, V] logits.

        ``active`` int64 [A] which requests of the round, ascending; ``tokens`` int64 [A, w];
        ``parents`` int64 [A, w] nodes in the order they were added, -1 for the text's last token:
        active ones of an earlier level or, with more than one of ``generations``, which are the
        longest path within the level, earlier ones of this level. (A head needs one generation.)
        """
        count, width = tokens.shape
        first = self.trees.nodes
        rows = self.trees.rows(active, parents, generations)
        own = slice(first, self.trees.nodes)
        self.read_last = hidden = self._level(active, own, parents, tokens.flatten(), rows)
        return self._logits(hidden).view(count, width, -1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [T, V] behind the rows whose ``hidden`` states [T, d] a pass has computed."""
        return self.model.logits(hidden)

    @abstractmethod
    def _level(
        self, active: torch.Tensor, own: slice, parents: torch.Tensor, tokens: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [A * w, d] of the nodes ``own`` of some requests, whose ``tokens`` are
        int64 [A * w]; see :meth:`grow` for the rest."""

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)


def pieces(known: list[int], lengths: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Divide what is new of R texts into passes of at most PROMPT_CHUNK rows.

    ``known``, ``lengths`` [R]: tokens of each text that are read already, and all of them. Yields
    (number of the text, first position, end) of a pass, text by text.
    """
    piece: list[tuple[int, int, int]] = []
    room = PROMPT_CHUNK
    for r, (first, length) in enumerate(zip(known, lengths, strict=True)):
        while first < length:
            end = min(length, first + room)
            piece.append((r, first, end))
            room -= end - first
            first = end
            if not room:
                yield piece
                piece, room = [], PROMPT_CHUNK
    if piece:
        yield piece


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
        super().__init__(model, cache, max_nodes)
        if record is not None:
            most_pages = -(-model.max_positions // PAGE)
            self.graphs = LevelGraphs(self._layers, record, cache, max_nodes, most_pages)

    def _inputs(self, rows):
        tokens = torch.zeros_like(rows.positions)
        return (tokens, *self.model.rotary(rows.positions))

    def _try(self, rows):
        self._forward(torch.zeros_like(rows.positions), rows, exact=True)

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
        of_version = versions or [None] * len(texts)
        known = [
            # The last token is always read, for its logits.
            min(self.cache.cached(name, text, version), len(text) - 1)
            for name, text, version in zip(requests, texts, of_version, strict=True)
        ]
        lengths = [len(text) for text in texts]
        table = self.cache.table(requests)
        last = []
        for piece in pieces(known, lengths):
            hidden = self._read(table, texts, piece)
            ends = np.cumsum([end - first for _, first, end in piece]) - 1
            ended = [end == lengths[r] for r, _, end in piece]
            last.append(hidden[self._to_device(ends[ended])])
        for name, text, version in zip(requests, texts, of_version, strict=True):
            self.cache.remember(name, text, version)
        on_device = self._to_device(np.array(lengths, np.int32))
        self._start_trees(on_device, self._to_device(table), on_device, max(lengths))
        return self._logits(torch.cat(last))

    def _read(
        self, table: np.ndarray, texts: list[np.ndarray], piece: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        """One exact pass over a ``piece`` (:func:`pieces`) of the texts, whose pages are ``table``
        int32 [R, P]; hidden [T, d]."""
        tokens = np.concatenate([texts[r][first:end] for r, first, end in piece])
        own = [r for r, *_ in piece]
        rows = Rows.of_text(self.cache, table[own], [place for _, *place in piece])
        return self._forward(self._to_device(tokens.astype(np.int64)), rows, exact=True)

    # -- layers -------------------------------------------------------------------------

    def _level(self, active, own, parents, tokens, rows):
        return self._forward(tokens, rows, exact=False)

    def _forward(self, tokens: torch.Tensor, rows: Rows, exact: bool) -> torch.Tensor:
        """Hidden states [T, d] of the last layer.

        ``tokens`` int64 [T] of ``rows``; ``exact``: they are text. (Only a layer-parallel draft
        treats nodes otherwise.)
        """
        # Outside of graphs: some variants look at the positions' values.
        cos, sin = self.model.rotary(rows.positions)
        if self.graphs is None or exact:
            return self._layers(rows, tokens, cos, sin)
        return self.graphs(rows, tokens, cos, sin)

    def _layers(
        self, rows: Rows, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`_forward`; ``cos``, ``sin`` [T, head_dim] of the positions."""
        model, attend = self.model, PagedAttention(self.cache, rows)
        hidden, rotary = model.embed(tokens), (cos, sin)
        for layer in range(model.num_layers):
            hidden = hidden + model.attention(layer, hidden, rotary, attend)
            hidden = hidden + model.mlp(layer, hidden)
        return hidden
