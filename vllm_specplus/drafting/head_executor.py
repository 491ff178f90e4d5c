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

import numpy as np
import torch

from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.drafting.executor import PROMPT_CHUNK, PROMPT_ROWS, TreeExecutor
from vllm_specplus.drafting.graphs import LevelGraphs, Record
from vllm_specplus.step import TargetRows

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

    model: EagleHead

    def __init__(
        self, head: EagleHead, max_nodes: int, max_requests: int, pages: int, page: int,
        record: Record | None = None,
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
        super().__init__(head, store, page, max_nodes)
        self._level_layer = LevelGraphs(self._layer, page, record) if record else self._layer
        self._first_tree_page = pages
        self._read = torch.zeros(pages, page, dtype=torch.bool, device=head.device)
        self._waiting: dict[str, Waiting] = {}

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
        late = []
        for r, name in enumerate(requests):
            waiting = self._waiting.get(name)
            if waiting is None or len(waiting) <= MOST_WAITING:
                continue
            while len(waiting) > PROMPT_ROWS:  # a prompt, by itself
                self._pass_text([r], [waiting.take(min(PROMPT_CHUNK, len(waiting) - 1))])
            if len(waiting) > MOST_WAITING:
                late.append((r, waiting.take(len(waiting) - 1)))
        if late:
            self._pass_text(*zip(*late, strict=True))

    @torch.inference_mode()
    def begin(self, requests: list[str], rows: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Read what waits of some requests, ``rows`` int64 [A] of those of :meth:`follow`,
        with texts of ``lengths`` int64 [A] tokens; float32 [A, V] logits behind their last.
        """
        news = []
        for name, length in zip(requests, lengths.tolist(), strict=True):
            waiting = self._waiting[name]
            # The newest token's own row is the target's next.
            if not len(waiting) or waiting.first + len(waiting) != length - 1:
                raise RuntimeError(f"no hidden states behind token {length - 2} of {name}")
            news.append(waiting.take(len(waiting)))
        hidden = self._pass_text(rows, news)
        every = torch.arange(len(news), device=hidden.device)
        last = self._to_device(np.array([len(states) - 1 for _, states in news]))
        hidden = hidden[every, last]
        self._features = hidden.new_empty(len(news), 1 + self.max_nodes, hidden.shape[-1])
        self._features[:, 0] = self.model.feature(hidden)

        width = -(-int(lengths.max()) // self._page)
        table = self._to_device(self._pages[rows, :width].astype(np.int64))
        trees = torch.arange(len(news) * self._pages_per_tree, device=hidden.device)
        trees = self._first_tree_page + trees.view(len(news), -1)
        text_rows = self._to_device(lengths - 1)
        slots = width * self._page
        text = torch.zeros(
            len(news), slots + trees.shape[1] * self._page, dtype=torch.bool, device=table.device
        )
        text[:, :slots] = self._visible(table, text_rows[:, None])[:, 0]
        first_slots = torch.full_like(text_rows, slots)
        self._start_trees(text_rows, torch.cat((table, trees), 1), first_slots, text)
        return self.model.logits(hidden)

    def _slots(self, requests: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [n] slot of each (request, position)."""
        pages = self._pages[requests, positions // self._page].astype(np.int64)
        return pages * self._page + positions % self._page

    def _visible(self, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """bool [R, n, slots]: which slots of the pages ``table`` int64 [R, P] hold one of the
        first ``lengths`` int64 [R, n] rows, and were read."""
        seen = torch.arange(table.shape[1] * self._page, device=table.device)
        return (seen < lengths[..., None]) & self._read[table].flatten(1)[:, None]

    def _pass_text(
        self, rows: Sequence[int] | np.ndarray, news: Sequence[tuple[int, torch.Tensor]]
    ) -> torch.Tensor:
        """One pass over new rows of some requests; y [A, widest, hidden]."""
        width = max(len(states) for _, states in news)
        shape = (len(news), width)
        tokens, positions, slots = np.zeros((3, *shape), np.int64)
        padding = np.ones(shape, bool)
        features = self.model.fuse(torch.cat([states for _, states in news]))
        for a, (r, (first, states)) in enumerate(zip(rows, news, strict=True)):
            here = np.arange(first, first + len(states))
            tokens[a, : len(here)] = self._tokens[r, here + 1]
            positions[a, : len(here)] = here
            slots[a, : len(here)] = self._slots(np.full(len(here), r), here)
            padding[a, : len(here)] = False
        padding = self._to_device(padding)
        padded = features.new_zeros(*shape, features.shape[-1])
        padded[~padding] = features
        reach = -(-int(positions.max() + 1) // self._page)
        table = self._to_device(self._pages[rows, :reach].astype(np.int64))
        tokens, positions, slots = map(self._to_device, (tokens, positions, slots))
        self._read.view(-1)[slots[~padding]] = True
        mask = self._visible(table, positions + 1)
        # Padding writes to page 0, which vLLM gives to nobody; it has to see something.
        mask[..., 0] |= padding
        cos, sin = self.model.rotary(positions)
        return self._layer(tokens, padded, cos, sin, slots, table, mask)

    # -- tree -------------------------------------------------------------------------

    def _level(self, active, own, parents, tokens, positions, slots, table, mask):
        features = self._features[active[:, None], 1 + parents]
        cos, sin = self.model.rotary(positions)
        hidden = self._level_layer(tokens, features, cos, sin, slots, table, mask)
        self._features[active[:, None], 1 + own] = self.model.feature(hidden)
        return hidden

    def _layer(self, tokens, features, cos, sin, slots, table, mask):
        self.cache.begin_pass(slots, table)
        return self.model(tokens, features, (cos, sin), mask[:, None], self.cache)
