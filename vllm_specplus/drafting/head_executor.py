"""Forward passes of a head over hidden states of the target.

The head's keys and values lie in pages numbered like the target's: what the target's
scheduler decides about a text, prefix caching and preemption, then holds for the head as
well. Only, the target computes a text at once, and the head may be late: rows that are not
drafted for wait, a few at a time, and a slot counts as *read* once the head has been there.
What is not (yet) read, the head does not see.

The row of a position needs the token after it. At the end of a page that is shared between
texts, that was the first text's; such a row may be slightly wrong for the others, as it is
in vLLM's own EAGLE. Drafts are verified whatever they were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.drafting.executor import PROMPT_CHUNK, TreeExecutor
from vllm_specplus.drafting.graphs import LevelGraphs, Record
from vllm_specplus.drafting.passes import PagedAttention, Rows
from vllm_specplus.step import TargetRows

if TYPE_CHECKING:
    from vllm_specplus.drafting.mtp import MtpHead
    from vllm_specplus.drafting.peagle import ParallelHead

#: Rows of a request that may wait.
MOST_WAITING = 16


@dataclass(slots=True)
class Waiting:
    """Consecutive rows of a text that the target has computed and the head has not read."""

    first: int
    """Position of the first one."""
    states: list[torch.Tensor] = field(default_factory=list)
    """[n, states * target_hidden] each."""

    def __len__(self) -> int:
        return sum(map(len, self.states))

    def take(self, count: int) -> tuple[int, torch.Tensor]:
        """The first ``count`` rows: (position of the first, states)."""
        rows = torch.cat(self.states)
        first, self.first = self.first, self.first + count
        rest = rows[count:]
        # A few rows may wait for long, and must not keep a prompt's.
        self.states = [rest.clone() if len(rest) <= MOST_WAITING else rest] if len(rest) else []
        return first, rows[:count]


class HeadExecutor(TreeExecutor):
    """Runs ``head`` for all requests of a step."""

    model: EagleHead | MtpHead | ParallelHead

    def __init__(
        self, head: EagleHead | MtpHead | ParallelHead, max_nodes: int, max_requests: int,
        pages: int, page: int, record: Record | None = None,
    ):  # fmt: skip
        """``pages``, ``page``: how many the target has, and slots per page; ``record``: makes
        graphs of levels."""
        # Behind the target's pages those of the trees, by index in the batch.
        self._pages_per_tree = -(-max_nodes // page)
        trees = max_requests * self._pages_per_tree
        store = PageStore(
            head.attention_layers, head.kv_heads, head.head_dim, pages + trees, page,
            head.dtype, head.device,
        )  # fmt: skip
        super().__init__(head, store, max_nodes)
        self._page = page
        if record is not None:
            most_pages = -(-head.max_positions // page) + self._pages_per_tree
            self.graphs = LevelGraphs(self._layer, record, store, max_nodes, most_pages)
        self._first_tree_page = pages
        self._read = torch.zeros(pages, page, dtype=torch.bool, device=head.device)
        self._waiting: dict[str, Waiting] = {}

    def _inputs(self, rows):
        head, tokens = self.model, torch.zeros_like(rows.positions)
        size = (len(tokens), head.config.hidden_size)
        features = torch.zeros(size, dtype=head.dtype, device=head.device)
        return (tokens, features, *head.rotary(rows.positions))

    def _try(self, rows):
        self._layer(rows, *self._inputs(rows))

    def forget(self, request: str) -> None:
        self._waiting.pop(request, None)

    # -- text -------------------------------------------------------------------------

    @torch.inference_mode()
    def follow(self, requests: list[str], tokens: np.ndarray, rows: TargetRows) -> None:
        """Take what the target has just computed. ``tokens`` int32 [R, n]: the texts."""
        self._tokens, self._pages = tokens, rows.pages
        counts = np.diff(rows.starts)
        slots = self._slots(np.repeat(np.arange(len(requests)), counts), rows.positions)
        self._read.view(-1)[self._to_device(slots)] = False
        for r, (name, count) in enumerate(zip(requests, counts.tolist(), strict=True)):
            if not count:
                continue
            begin = int(rows.starts[r])
            first = int(rows.positions[begin])
            if first + count > self.model.max_positions:  # nothing is drafted behind them
                self.forget(name)
                continue
            waiting = self._waiting.get(name)
            if waiting is None or waiting.first + len(waiting) != first:
                # New, or computed anew after a preemption.
                waiting = self._waiting[name] = Waiting(first)
            # A copy: a view of one row would keep all of the step's.
            waiting.states.append(rows.states[begin : begin + count].clone())
        self._read_late(requests)

    def _read_late(self, requests: list[str]) -> None:
        """Read what waits of requests of which too much does, but for the last row, whose
        logits may be wanted."""
        late: list[tuple[int, tuple[int, torch.Tensor]]] = []
        room = PROMPT_CHUNK
        for r, name in enumerate(requests):
            waiting = self._waiting.get(name)
            if waiting is None or len(waiting) <= MOST_WAITING:
                continue
            while len(waiting) > 1:
                count = min(room, len(waiting) - 1)
                late.append((r, waiting.take(count)))
                room -= count
                if not room:
                    self._pass_text(*zip(*late, strict=True))
                    late, room = [], PROMPT_CHUNK
        if late:
            self._pass_text(*zip(*late, strict=True))

    @torch.inference_mode()
    def begin(self, requests: list[str], rows: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Read what waits of some requests, ``rows`` int64 [A] of those of :meth:`follow`,
        with texts of ``lengths`` int64 [A] tokens; float32 [A, V] logits behind their last.
        """
        news = self.take(requests, lengths)
        hidden = self._pass_text(rows, news)
        last = np.cumsum([len(states) for _, states in news]) - 1
        hidden = hidden[self._to_device(last)]
        self._features = hidden.new_empty(len(news), 1 + self.max_nodes, hidden.shape[-1])
        self._features[:, 0] = self.model.feature(hidden)

        width = -(-int(lengths.max()) // self._page)
        trees = self._first_tree_page + np.arange(len(news) * self._pages_per_tree)
        table = np.concatenate(
            (self._pages[rows, :width], trees.reshape(len(news), -1)), 1, dtype=np.int32
        )
        text_rows = self._to_device((lengths - 1).astype(np.int32))
        slots = width * self._page
        first_slots = torch.full_like(text_rows, slots)
        self._start_trees(text_rows, self._to_device(table), first_slots, slots)
        return self.model.logits(hidden)

    def take(self, requests: list[str], lengths: np.ndarray) -> list[tuple[int, torch.Tensor]]:
        """What waits of some requests with texts of ``lengths`` int64 [A] tokens, which is all that
        was not read: (position of the first row, states) of each."""
        news = []
        for name, length in zip(requests, lengths.tolist(), strict=True):
            waiting = self._waiting[name]
            # The newest token's own row is the target's next.
            if not len(waiting) or waiting.first + len(waiting) != length - 1:
                raise RuntimeError(f"no hidden states behind token {length - 2} of {name}")
            news.append(waiting.take(len(waiting)))
        return news

    def _slots(self, requests: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [n] slot of each (request, position)."""
        pages = self._pages[requests, positions // self._page].astype(np.int64)
        return pages * self._page + positions % self._page

    def _pass_text(
        self, requests: Sequence[int] | np.ndarray, news: Sequence[tuple[int, torch.Tensor]]
    ) -> torch.Tensor:
        """One pass over new rows of some requests, ``news`` [A] of (position of the first one,
        states); y [T, hidden]."""
        pieces = [(first, first + len(states)) for first, states in news]
        table = self._pages[requests, : -(-max(end for _, end in pieces) // self._page)]
        rows = Rows.of_text(self.cache, table, pieces)
        tokens = np.concatenate(
            [self._tokens[r, first + 1 : end + 1]
             for r, (first, end) in zip(requests, pieces, strict=True)]
        )  # fmt: skip
        self._read.view(-1)[rows.slots] = True
        features = self.model.fuse(torch.cat([states for _, states in news]))
        tokens = self._to_device(tokens.astype(np.int64))
        return self._layer(rows, tokens, features, *self.model.rotary(rows.positions))

    # -- tree -------------------------------------------------------------------------

    def _level(self, active, own, parents, tokens, rows):
        features = self._features[active[:, None], 1 + parents].flatten(0, 1)
        inputs = tokens, features, *self.model.rotary(rows.positions)
        run = self._layer if self.graphs is None else self.graphs
        hidden = run(rows, *inputs)
        below = self.model.feature(hidden).unflatten(0, parents.shape)
        self._features[active, 1 + own.start : 1 + own.stop] = below
        return hidden

    def _layer(self, rows, tokens, features, cos, sin):
        attend = PagedAttention(self.cache, rows, self._read)
        return self.model(tokens, features, (cos, sin), attend)
