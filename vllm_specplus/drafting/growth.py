"""Trees that grow level by level behind their texts: which rows a level has, and what they see."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.passes import Rows


class Growth:
    """The trees of R requests, in one round of drafting."""

    def __init__(
        self, store: PageStore, max_nodes: int, lengths: torch.Tensor, table: torch.Tensor,
        first_slots: torch.Tensor, reach: int,
    ):  # fmt: skip
        """``max_nodes``: of one tree; ``lengths`` int32 [R] rows of the texts; ``table`` int32
        [R, P] their pages in ``store``; ``first_slots`` int32 [R] where, in the slots of these, the
        nodes go, none of them beyond ``reach``."""
        self.nodes = 0
        """Of each tree, so far."""
        self._store, self._max_nodes, self._reach = store, max_nodes, reach
        self._length, self._table, self._first_slot = lengths, table, first_slots
        size: tuple[int, ...] = (len(lengths), max_nodes)
        # Nodes of trees that a level is not of keep their numbers: they are nobody's.
        self._parent = torch.full(size, -1, dtype=torch.int32, device=store.device)
        self._depth = torch.zeros_like(self._parent)
        if not store.packed:
            size = (*size, max_nodes)
            self._ancestors = torch.zeros(size, dtype=torch.bool, device=store.device)

    def rows(self, active: torch.Tensor, parents: torch.Tensor, generations: int = 1) -> Rows:
        """The rows of a new level of the trees ``active`` int64 [A], ascending, below ``parents``
        int64 [A, w]; see ``TreeExecutor.grow``."""
        first, self.nodes = self.nodes, self.nodes + parents.shape[1]
        if self._store.packed:
            return self._packed_rows(active, parents, first)
        count, width = parents.shape
        nodes, device, page = self.nodes, parents.device, self._store.page
        requests: torch.Tensor | slice = active
        if count == len(self._length):
            requests = slice(None)  # all: without copies
        for _ in range(generations):
            above = self._depth[requests].gather(1, parents.clamp(min=0))
            depth = torch.where(parents < 0, 0, above + 1)
            self._depth[requests, first:nodes] = depth
        length, table, first_slot = (
            each[requests] for each in (self._length, self._table, self._first_slot)
        )
        at = first_slot[:, None] + torch.arange(first, nodes, device=device)
        slots = table.gather(1, at // page) * page + at % page
        each = torch.arange(count + 1, dtype=torch.int32, device=device)
        return Rows(
            (length[:, None] + depth).flatten().long(), slots.flatten(), each * width, first_slot,
            length, table, each * nodes, self._depth[requests, :nodes].flatten(),
            self._seen(requests, parents, first, generations), width, self._reach,
        )  # fmt: skip

    def _seen(
        self, requests: torch.Tensor | slice, parents: torch.Tensor, first: int, generations: int
    ) -> torch.Tensor:
        """bool [A * w, max_nodes]: which nodes those of the level see that begins at ``first``."""
        width = parents.shape[1]
        top = parents.clamp(min=0)[..., None].expand(-1, -1, self._max_nodes)
        own = torch.eye(width, dtype=torch.bool, device=parents.device)
        for _ in range(generations):
            ancestors = self._ancestors[requests].gather(1, top) & (parents >= 0)[..., None]
            ancestors[:, :, first : self.nodes] |= own
            self._ancestors[requests, first : self.nodes] = ancestors
        return ancestors.flatten(0, 1)

    def _packed_rows(self, active: torch.Tensor, parents: torch.Tensor, first: int) -> Rows:
        """The same on the CPU, by one loop: of a small draft's level, some twenty small tensors
        would take as long as a layer."""
        count, width = parents.shape
        table, contexts, ends = self._table, self._first_slot, self._length
        if count < len(ends):
            table, contexts, ends = table[active], contexts[active], ends[active]
        places = torch.empty((2, count * width), dtype=torch.int64)
        offsets = torch.empty((2, count + 1), dtype=torch.int32)
        nodes = torch.empty((2, count * self.nodes), dtype=torch.int32)
        _grow(
            active.numpy(), parents.contiguous().numpy(), first, self._parent.numpy(),
            self._depth.numpy(), ends.numpy(), contexts.numpy(), table.numpy(), self._store.page,
            places.numpy(), offsets.numpy(), nodes.numpy(),
        )  # fmt: skip
        return Rows(
            *places, offsets[0], contexts, ends, table, offsets[1], *nodes, width, self._reach
        )


# A signature makes numba compile at import, while the engine starts, not in its first step.
@njit(
    "void(int64[::1], int64[:, ::1], int64, int32[:, ::1], int32[:, ::1], int32[::1], int32[::1],"
    "int32[:, ::1], int64, int64[:, ::1], int32[:, ::1], int32[:, ::1])",
    cache=True,
    nogil=True,
)
def _grow(
    active, parents, first, parent, depth, lengths, first_slots, table, page, places, offsets, nodes
):
    """Add a level of ``parents`` [A, w], from node ``first`` on, to the trees ``active`` of
    ``parent`` and ``depth`` [R, max_nodes]; ``lengths``, ``first_slots`` [A] and ``table`` [A, P]
    are those of the active ones. Writes positions and slots to ``places`` [2, A * w], the offsets
    of rows and of nodes to ``offsets`` [2, A + 1], depths and parents of all nodes to ``nodes``
    [2, A * (first + w)]."""
    count, width = parents.shape
    total = first + width
    for a in range(count):
        r = active[a]
        for j in range(width):
            above = parents[a, j]
            parent[r, first + j] = above
            depth[r, first + j] = 0 if above < 0 else depth[r, above] + 1
            row, at = a * width + j, first_slots[a] + first + j
            places[0, row] = lengths[a] + depth[r, first + j]
            places[1, row] = np.int64(table[a, at // page]) * page + at % page
        for i in range(total):
            nodes[0, a * total + i], nodes[1, a * total + i] = depth[r, i], parent[r, i]
    for a in range(count + 1):
        offsets[0, a], offsets[1, a] = a * width, a * total
