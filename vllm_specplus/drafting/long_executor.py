"""Forward passes of a long draft over the batch: a window of each text, then tree levels.

The draft's own keys and values of a text are those of its last tokens, in a *ring* of pages that is
as large for a text of a million tokens as for one of a thousand. Each slot is marked with the
position and the token whose keys and values it holds: what has another mark, after an accepted or a
rejected draft, a preemption or in another's pages, is made anew, a row of two projections each.

The tree kernels count positions from the first slot of the pages they are given, and windows are
counted in positions. So a text begins, for them, at the page where its window does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.drafting.cache import PAGE, PageStore
from vllm_specplus.drafting.context_pages import ContextPages, ContextRows
from vllm_specplus.drafting.executor import LONG_CONTEXT, PROMPT_CHUNK, TreeExecutor
from vllm_specplus.drafting.long_draft import LongDraft
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.passes import PagedAttention, Rows


@dataclass(slots=True)
class _Ring:
    """The pages of one request."""

    first: int
    """Number of the first one; the others follow."""
    marks: np.ndarray
    """int64 [slots] which position and token each slot of the window holds, -1: none."""
    round: int = 0
    """When it was last asked for."""


def _marks(positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """int64 [n], one for each pair of ``positions`` int64 [n] and ``tokens`` int32 [n]."""
    return positions << 32 | tokens


class LongExecutor(TreeExecutor):
    """Runs ``model`` for all requests of a step; holds their rings."""

    model: LongDraft
    target: ContextPages
    """What the draft sees of the target; see :meth:`read_from`."""

    def __init__(self, draft: LongDraft, max_slots: int, max_nodes: int):
        """``max_slots``: that the rings have in all; ``max_nodes``: of one request's tree."""
        # A window of W positions and the row itself begin anywhere in a page.
        window_pages = -(-draft.window // PAGE) + 1
        self._ring_pages = window_pages + -(-max_nodes // PAGE)
        self._window_slots = window_pages * PAGE
        self.rings = (max_slots // PAGE - 1) // self._ring_pages
        """Requests that can be drafted for at once."""
        if self.rings < 1:
            raise DraftModelError(
                f"'kv_memory_mb' has room for {max_slots} positions of the draft, and one request "
                f"needs {(self._ring_pages + 1) * PAGE}: raise it"
            )
        store = PageStore(
            draft.attention_layers, draft.kv_heads, draft.head_dim,
            1 + self.rings * self._ring_pages, PAGE, draft.dtype, draft.device,
        )  # fmt: skip
        super().__init__(draft, store, max_nodes)
        # Page 0 belongs to nobody.
        self._free = [1 + ring * self._ring_pages for ring in range(self.rings)]
        self._of: dict[str, _Ring] = {}
        self._round = 0

    def read_from(self, target: ContextPages) -> None:
        """Attend to these pages from now on; DraftModelError if they are of another target."""
        draft = self.model
        if target.head_dim != draft.head_dim or draft.heads % target.kv_heads:
            raise DraftModelError(
                f"the long draft has {draft.heads} heads of {draft.head_dim} units, and its "
                f"target's last layer {target.kv_heads} KV heads of {target.head_dim}: use a draft "
                f"of this target"
            )
        self.target = target

    def held_bytes(self) -> int:
        """Of the rings, whatever the texts."""
        draft, slots = self.model, self.cache.pages * PAGE
        return 2 * slots * draft.kv_heads * draft.head_dim * draft.dtype.itemsize

    def _inputs(self, rows):
        return torch.zeros_like(rows.positions), rows.positions

    def _try(self, rows):
        device = self.cache.device
        for context in (1, LONG_CONTEXT):
            pages = torch.zeros(1, -(-context // self.target.page), dtype=torch.int32)
            contexts = torch.tensor([context], dtype=torch.int32)
            seen = ContextRows(
                rows.starts, contexts.to(device), pages.to(device), rows.most_rows, context
            )
            self._run(rows, *self._inputs(rows), seen)

    # -- rings ----------------------------------------------------------------------------

    def room(self, request: str) -> bool:
        """Has the request a ring, or can it have one? Takes that of the request that has gone
        without drafts for longest, but none that was asked for in this round."""
        ring = self._of.get(request)
        if ring is None:
            first = self._free.pop() if self._free else self._taken()
            if first is None:
                return False
            ring = self._of[request] = _Ring(first, np.full(self._window_slots, -1, np.int64))
        ring.round = self._round
        return True

    def _taken(self) -> int | None:
        name = min(self._of, key=lambda each: self._of[each].round)
        return None if self._of[name].round == self._round else self._of.pop(name).first

    def forget(self, request: str) -> None:
        """The request is gone."""
        ring = self._of.pop(request, None)
        if ring is not None:
            self._free.append(ring.first)

    # -- text -----------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(
        self, requests: Sequence[str], texts: Sequence[np.ndarray], pages: np.ndarray
    ) -> torch.Tensor:
        """Bring the windows up to each text; float32 [A, V] logits behind their last tokens.

        ``texts``: int32 [n] each, n >= 2, of requests that have :meth:`room`, and of which the
        target has computed all but the last token, in its ``pages`` int32 [A, P].
        """
        self._round += 1
        rings = [self._of[name] for name in requests]
        lengths = np.array([len(text) for text in texts])
        firsts = np.maximum(lengths - 1 - self.model.window, 0)
        marked = self._fill(rings, texts, firsts)
        self._see(lengths - 1, pages)
        # From here on a text begins at the page of the first token that is seen.
        bases = firsts // PAGE * PAGE
        table = np.stack([self._table(*each) for each in zip(rings, bases // PAGE, strict=True)])
        own = lengths - bases
        rows = Rows.of_text(self.cache, table, [(n - 1, n) for n in own.tolist()])
        self._bases = self._to_device(bases)
        newest = self._to_device(np.array([text[-1] for text in texts], np.int64))
        hidden = self._run(rows, newest, rows.positions + self._bases, self._seen(None, 1))
        for ring, at, marks in marked:
            ring.marks[at] = marks
        text_rows = self._to_device(own.astype(np.int32))
        first_slots = torch.full_like(text_rows, self._window_slots)
        self._start_trees(text_rows, self._to_device(table), first_slots, self._window_slots)
        return self.model.logits(hidden)

    def _table(self, ring: _Ring, page: int) -> np.ndarray:
        """int32 [ring's pages]: those of its window, that of the text's ``page`` first, and those
        of its tree."""
        window_pages = self._window_slots // PAGE
        window = (page + np.arange(window_pages)) % window_pages
        tree = np.arange(window_pages, self._ring_pages)
        return (ring.first + np.concatenate((window, tree))).astype(np.int32)

    def _fill(
        self, rings: Sequence[_Ring], texts: Sequence[np.ndarray], firsts: np.ndarray
    ) -> list[tuple[_Ring, np.ndarray, np.ndarray]]:
        """Write what the windows lack of each text from ``firsts`` int64 [A] on, but for its last
        token, which is written by the pass that reads it. Returns (ring, slots of its window, their
        marks) as they will be then."""
        marked, tokens, positions, slots = [], [], [], []
        for ring, text, first in zip(rings, texts, firsts.tolist(), strict=True):
            places, seen = np.arange(first, len(text)), text[first:]
            at, marks = places % self._window_slots, _marks(places, seen)
            new = ring.marks[at] != marks
            new[-1] = False
            marked.append((ring, at, marks))
            tokens.append(seen[new].astype(np.int64))
            positions.append(places[new])
            slots.append(ring.first * PAGE + at[new])
        given = (self._to_device(np.concatenate(each)) for each in (tokens, positions, slots))
        for part in zip(*(each.split(PROMPT_CHUNK) for each in given), strict=True):
            self._write(*part)
        return marked

    def _write(self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Keys and values of ``tokens`` at ``positions`` into ``slots``, int64 [n] each."""
        if len(tokens):
            rotary = self.model.rotary(positions)
            self.cache.write(0, slots, *self.model.keys_and_values(tokens, rotary))

    # -- what both texts and trees see of the target -----------------------------------------

    def _see(self, contexts: np.ndarray, pages: np.ndarray) -> None:
        """The first ``contexts`` int64 [A] positions of each text, in the target's ``pages``."""
        self._reach = int(contexts.max())
        width = -(-self._reach // self.target.page)
        self._contexts = self._to_device(contexts.astype(np.int32))
        self._pages = self._to_device(pages[:, :width])

    def _seen(self, active: torch.Tensor | None, width: int) -> ContextRows:
        """That of ``width`` rows of each of the requests ``active`` int64 [n], None: of all."""
        contexts, pages = self._contexts, self._pages
        if active is not None and len(active) < len(contexts):
            contexts, pages = contexts[active], pages[active]
        starts = torch.arange(len(contexts) + 1, dtype=torch.int32, device=contexts.device)
        return ContextRows(starts * width, contexts, pages, width, self._reach)

    def _level(self, active, own, parents, tokens, rows):
        width = parents.shape[1]
        bases = self._bases[active].repeat_interleave(width)
        return self._run(rows, tokens, rows.positions + bases, self._seen(active, width))

    def _run(
        self, rows: Rows, tokens: torch.Tensor, positions: torch.Tensor, seen: ContextRows
    ) -> torch.Tensor:
        """y [T, hidden] of ``rows`` with ``tokens`` at ``positions``, int64 [T] each."""

        def cross(query: torch.Tensor, scale: float) -> torch.Tensor:
            return self.target.attend(query, seen, scale)

        attend = PagedAttention(self.cache, rows)
        return self.model(tokens, self.model.rotary(positions), attend, cross)
