"""Drafting with the target's own layers, some of them left out.

Draft & Verify (arXiv 2309.08168), SWIFT (arXiv 2410.06916) and DEL (arXiv 2504.05598): no
second model and no second set of weights. The draft's cache holds *copies* of the keys and
values the target computed, so a text is never read by the draft: only its newest token and
the nodes behind it pass through the layers that are kept. What those write is overwritten by
the next copy. Layers that no draft can run have no copies.

Which layers to leave out is found while serving (``skip_search.py``, ``exits.py``), by *replay*:
tokens of running texts are predicted once more by a candidate, all in one pass. *Apart*, each is
predicted from the exact keys and values before it, as the first node of a draft is; *in line*, as
SWIFT does it, from those that the candidate itself has computed for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.drafting.cache import PAGE
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.passes import Attend, PagedAttention, Rows
from vllm_specplus.drafting.skip_search import Skips
from vllm_specplus.step import ReadKV

#: Tokens of a text that a replay predicts (SWIFT's context_window).
WINDOW = 32

KeysValues = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Layer by layer, keys and values [n, kv_heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Which layers a pass runs."""

    skips: Skips
    exits: tuple[int, ...] = ()
    """After how many layers, ascending, it is looked at; the pass ends behind the last. Empty: all
    layers run, and what is behind them is all that is wanted."""
    logits: bool = False
    """Are the logits looked at, or the hidden states?"""


Look = Callable[[int, torch.Tensor], None]
"""Called with an exit, and the logits [T, V] or hidden states [T, d] behind it."""


class SelfDraftExecutor(DraftExecutor):
    """A draft executor over the target's layers; ``skips`` may change between rounds."""

    def __init__(self, model, max_slots: int, max_nodes: int):
        super().__init__(model, max_slots, max_nodes)
        self.skips = Skips()
        self.exits: np.ndarray | None = None
        """int64 [R] after how many layers each request of the round is left; None: ``skips`` says
        what runs, for all."""
        self._row_exits: np.ndarray | None = None
        """The same of the rows of a pass."""

    def room(self, request: str, length: int) -> bool:
        # Nodes never go beyond the target's context, whose positions these are; a replay's
        # rows lie where the nodes do.
        return self.cache.reserve(request, length + max(self.max_nodes, WINDOW))

    @torch.inference_mode()
    def follow(
        self, requests: list[str], texts: list[np.ndarray], rows: np.ndarray, read: ReadKV,
        versions: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Copy what the target computed of each text since the last call: all but its last
        token. ``rows`` int64 [R] are the requests' numbers for ``read``; ``versions`` [R] as in
        :meth:`begin`."""
        table = self.cache.table(requests)
        of_version = versions or [None] * len(texts)
        news = [
            np.arange(self.cache.cached(name, text[:-1], version), len(text) - 1)
            for name, text, version in zip(requests, texts, of_version, strict=True)
        ]
        slots = [
            pages[new // PAGE] * PAGE + new % PAGE for pages, new in zip(table, news, strict=True)
        ]
        positions = np.concatenate(news)
        if len(positions):
            origin = np.repeat(rows, [len(new) for new in news])
            self._copy(np.concatenate(slots), origin, positions, read)
        self._remember(requests, texts, of_version)

    def _copy(
        self, slots: np.ndarray, requests: np.ndarray, positions: np.ndarray, read: ReadKV
    ) -> None:
        """Copy what the target holds of ``requests`` at ``positions`` to ``slots`` of the cache,
        int64 [n] each."""
        self.cache.store(self._to_device(slots), self._held(read(requests, positions)))

    def _held(self, layers: Iterator[tuple]) -> Iterator[tuple]:
        """Of keys and values of all ``layers``, in order, those that have copies."""
        wanted = set(self.cache.layers)
        for number, layer in enumerate(layers):
            if number in wanted:
                wanted.discard(number)
                yield layer
            if not wanted:
                return

    def _remember(
        self, requests: list[str], texts: list[np.ndarray], of_version: Sequence[int | None]
    ) -> None:
        # The last token's keys and values are the draft's until the target has computed them.
        for name, text, version in zip(requests, texts, of_version, strict=True):
            self.cache.remember(name, text[:-1], version)

    @torch.inference_mode()
    def replay(
        self, requests: list[str], texts: list[np.ndarray], starts: np.ndarray,
        skips: Skips, exits: list[int], ends: np.ndarray | None = None, in_line: bool = False,
    ) -> tuple[np.ndarray, int]:  # fmt: skip
        """Predict each text's last tokens once more, greedily.

        At most WINDOW tokens of each text that :meth:`follow` has seen, before index ``ends`` int64
        [R] (None: its end) and not before ``starts`` int64 [R] (1 or more); ``in_line``: see the
        module's docstring. Returns how many predictions after the first ``e`` layers were right,
        int64, for each ``e`` of ``exits``; and how many there were.
        """
        lengths = np.array([len(text) for text in texts])
        ends = lengths if ends is None else ends.astype(np.int64)
        counts = np.minimum(WINDOW, ends - starts).clip(0)
        request = np.repeat(np.arange(len(texts)), counts)
        number = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        before = (ends - 1 - counts)[request] + number  # whose next tokens are predicted
        places = list(zip(request.tolist(), before.tolist(), strict=True))
        tokens = self._to_device(np.array([texts[r][i] for r, i in places], np.int64))
        targets = self._to_device(np.array([texts[r][i + 1] for r, i in places], np.int64))
        table = self.cache.table(requests)
        if in_line:
            some = counts > 0
            rows = self._in_line(
                table[some], (ends - 1 - counts)[some], lengths[some], counts[some]
            )
        else:
            rows = self._apart(table[request], before, lengths[request] + number)
        right: list[torch.Tensor] = []

        def count(layers: int, logits: torch.Tensor) -> None:
            right.append((logits.argmax(-1) == targets).sum())

        self._pass(Pass(skips, tuple(exits), logits=True), tokens, rows, count)
        return torch.stack(right).cpu().numpy(), len(request)

    def _apart(self, table: np.ndarray, positions: np.ndarray, cached_at: np.ndarray) -> Rows:
        """T rows at ``positions`` int64 [T] that see the text before them and themselves, each a
        request of its own with the pages ``table`` int32 [T, P]; ``cached_at`` int64 [T]: where, in
        the slots of these, their own keys and values go."""
        page, count = self.cache.page, len(positions)
        slots = table[np.arange(count), cached_at // page].astype(np.int64) * page
        each = np.arange(count + 1, dtype=np.int32)
        related = np.full(count, -1, np.int32) if self.cache.packed else np.ones((count, 1), bool)
        contexts, ends = cached_at.astype(np.int32), positions.astype(np.int32)
        tensors = (
            positions, slots + cached_at % page, each, contexts, ends, table, each,
            np.zeros(count, np.int32), related,
        )  # fmt: skip
        return Rows(*map(self._to_device, tensors), 1, int(cached_at.max()))

    def _in_line(
        self, table: np.ndarray, firsts: np.ndarray, cached_at: np.ndarray, counts: np.ndarray
    ) -> Rows:
        """For each request ``counts`` rows from position ``firsts`` on that see the text before
        them and, one after another, each other; their keys and values go to its slots from
        ``cached_at`` on. All int64 [R], none of the counts 0; ``table`` int32 [R, P]."""
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        request = np.repeat(np.arange(len(counts)), counts)
        depths = np.arange(starts[-1], dtype=np.int32) - starts[:-1][request]
        at, page = cached_at[request] + depths, self.cache.page
        slots = table[request, at // page].astype(np.int64) * page + at % page
        related = depths - 1
        if not self.cache.packed:
            related = depths[:, None] >= np.arange(counts.max(), dtype=np.int32)
        tensors = (
            firsts[request] + depths, slots, starts, cached_at.astype(np.int32),
            firsts.astype(np.int32), table, starts, depths, related,
        )  # fmt: skip
        return Rows(*map(self._to_device, tensors), int(counts.max()), int(at.max()) + 1)

    @torch.inference_mode()
    def begin(
        self, requests: list[str], texts: list[np.ndarray], versions: list[int] | None = None
    ) -> torch.Tensor:
        logits = super().begin(requests, texts, versions)
        self._remember(requests, texts, versions or [None] * len(texts))
        return logits

    def _read(self, table, texts, piece):
        if self.exits is not None:
            rows_of = [end - first for _, first, end in piece]
            self._row_exits = np.repeat(self.exits[[r for r, *_ in piece]], rows_of)
        return super()._read(table, texts, piece)

    def _level(self, active, own, parents, tokens, rows):
        if self.exits is not None:
            here = self.exits[active.cpu().numpy()]
            self._row_exits = np.repeat(here, parents.shape[1])
        return super()._level(active, own, parents, tokens, rows)

    def _forward(self, tokens, rows, exact):
        if self.exits is None:
            return self._pass(Pass(self.skips), tokens, rows)
        exits = self._to_device(self._row_exits)
        left: list[torch.Tensor] = []

        def take(layers: int, hidden: torch.Tensor) -> None:
            # From the shallow exits on: a row keeps what was behind its own.
            later = (exits >= layers)[:, None]
            left[:] = [torch.where(later, hidden, left[0]) if left else hidden]

        which = Pass(Skips(), tuple(np.unique(self._row_exits).tolist()))
        self._pass(which, tokens, rows, take)
        return left[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [T, V] of hidden states [T, d] that the target has computed, before its last
        norm."""
        return self._logits(hidden.to(self.model.dtype))

    def _pass(
        self, which: Pass, tokens: torch.Tensor, rows: Rows, look: Look | None = None
    ) -> torch.Tensor:
        """Hidden states [T, d] behind the last layer of a pass over ``tokens`` int64 [T]; ``look``
        is called at each of its exits."""
        return self._run(which, tokens, rows, PagedAttention(self.cache, rows), look)

    def _run(
        self, which: Pass, tokens: torch.Tensor, rows: Rows, attend: Attend, look: Look | None
    ) -> torch.Tensor:
        """As :meth:`_pass`, by the attention ``attend``."""
        model, skips = self.model, which.skips
        hidden, rotary = model.embed(tokens), model.rotary(rows.positions)
        for layer in range(which.exits[-1] if which.exits else model.num_layers):
            if layer not in skips.attention:
                hidden = hidden + model.attention(layer, hidden, rotary, attend)
            if layer not in skips.mlp:
                hidden = hidden + model.mlp(layer, hidden)
            if look is not None and layer + 1 in which.exits:
                look(layer + 1, model.logits(hidden) if which.logits else hidden)
        return hidden
