"""Which of several sources of drafts pay.

A source is worth its time if, without it, more tokens per second would not be had. What it brings
are the tokens that no cheaper source would have brought; what it takes is its own time. (The rows
that it displaces compete node by node, by survival: ``control/budget.py``.) Both are measured on
the steps in which it is asked:

    brings  its tokens / all tokens       a step's output would be so much smaller
    takes   its seconds / all seconds     a step would be so much shorter

Of the steps with drafts only every few are measured, which tells as much and takes less. A source
that takes more than it brings rests. It goes on learning, which takes time too and is not
saved, so it is taken off; and it is asked again for a few steps now and then: traffic changes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_specplus.control.acceptance import label_nodes
from vllm_specplus.control.outcomes import DraftedTrees
from vllm_specplus.step import StepContext
from vllm_specplus.tree import DraftBatch

#: One in so many steps with drafts is measured, but while some source rests.
EVERY = 4
#: What a measured step still counts one later.
MEMORY = 0.98
#: Tokens seen before anything is judged.
LEAST_TOKENS = 64.0
#: A source that takes less than this share of a step's time is always asked.
NEGLIGIBLE = 0.003
#: Steps that a source rests at first and at most, and steps for which it is asked then.
RESTS, TRIAL = (16, 256), 8
#: Where nothing was measured.
LEAST_SECONDS = 1e-9
#: A step that seems to have taken so many times the average has waited for requests.
PAUSE = 4.0


@njit(cache=True)
def credit(finders, cheapest):
    """Int32 [N]: of the sources that found each node, the first in ``cheapest`` int64 [M].

    ``finders`` int32 [N] has a bit for each source.
    """
    out = np.empty(finders.shape[0], np.int32)
    for i in range(finders.shape[0]):
        for m in cheapest:
            if finders[i] >> m & 1:
                out[i] = m
                break
    return out


@njit(cache=True)
def brought(tokens, parents, starts, credited, drafted_at, rows, token_ids, num_tokens, out):
    """Add to ``out`` float64 [M] the tokens that each source is credited with.

    Trees as in ``DraftedTrees``, ``credited`` int32 [N] the source of each node; ``rows`` int32 [R]
    finds their requests in ``token_ids`` int32 [B, max_len], of which ``num_tokens`` int32 [B] are
    known by now; -1: gone.
    """
    for r in range(starts.shape[0] - 1):
        first, end = starts[r], starts[r + 1]
        if rows[r] < 0 or first == end:
            continue
        labels, _ = label_nodes(
            tokens[first:end], parents[first:end], token_ids[rows[r]], drafted_at[r],
            num_tokens[rows[r]],
        )  # fmt: skip
        for i in range(end - first):
            if labels[i] == 1:
                out[credited[first + i]] += 1.0


class Payoff:
    """Decides which of M sources are asked in a step."""

    def __init__(self, sources: int):
        # Over the steps in which each was asked: tokens credited to it, tokens of all requests,
        # seconds it took and seconds of the steps.
        self._brought, self._tokens, self._took, self._seconds = np.zeros((4, sources))
        # Over those in which it rested.
        self._learning, self._others = np.zeros((2, sources))
        self.resting = np.zeros(sources, bool)
        """Bool [M] sources that do not pay now."""
        self._idle = np.zeros(sources, np.int64)  # steps since it was last asked
        self._rest = np.full(sources, RESTS[0])
        self._trial = np.zeros(sources, np.int64)  # steps left of it
        self._asked = self._all = np.ones(sources, bool)
        self._steps = 0
        self._times = np.zeros(sources)  # of the last step
        self._average = 0.0  # seconds of a step
        # The trees of the last step; the sources of its nodes are those that are credited.
        self._drafted: DraftedTrees | None = None

    def learn(self, step: StepContext, interval: float) -> None:
        """Credit the sources with what became of the last trees, if there were any; ``interval``:
        seconds since the last step began."""
        trees, self._drafted = self._drafted, None
        if trees is not None and self._learn(trees, step, interval):
            self._judge()

    def drafted(
        self, step: StepContext, times: np.ndarray, drafts: DraftBatch, finders: np.ndarray
    ) -> None:
        """Remember the fused trees ``drafts``; the sources took ``times`` float64 [M] seconds, and
        ``finders`` int32 [N] has a bit for each source that found the node."""
        self._times[:] = times
        starts = np.zeros(len(drafts.counts) + 1, np.int32)
        np.cumsum(drafts.counts, out=starts[1:])
        self._drafted = DraftedTrees(
            list(step.request_ids), step.num_tokens.copy(), drafts.tokens.copy(),
            drafts.parents.copy(), credit(finders, np.argsort(self._takes(), kind="stable")),
            starts, np.zeros(len(drafts.counts)),
        )  # fmt: skip

    def forget(self, request_id: str) -> None:
        """The request is gone; its id may come again, with another text."""
        if self._drafted is not None:
            self._drafted.forget(request_id)

    def _learn(self, trees: DraftedTrees, step: StepContext, interval: float) -> bool:
        """False: nothing can be told from that step."""
        rows = trees.rows_in(step.request_ids)
        here = rows >= 0
        if not here.any():  # nobody is left: time has passed without work
            return False
        found = np.zeros(len(self._times))
        brought(
            trees.tokens, trees.parents, trees.starts, trees.sources, trees.drafted_at, rows,
            step.token_ids, step.num_tokens, found,
        )  # fmt: skip
        tokens = float((step.num_tokens[rows[here]] - trees.drafted_at[here]).sum())
        seconds = min(interval, PAUSE * self._average) if self._average else interval
        self._average += 0.1 * (seconds - self._average) if self._average else seconds
        asked = self._asked
        for sums, news in (
            (self._brought, found), (self._tokens, tokens),
            (self._took, self._times), (self._seconds, seconds),
        ):  # fmt: skip
            sums[asked] = (MEMORY * sums + news)[asked]
        for sums, news in ((self._learning, self._times), (self._others, seconds)):
            sums[~asked] = (MEMORY * sums + news)[~asked]
        return True

    def _takes(self) -> np.ndarray:
        """Float64 [M] share of a step's time that asking each takes."""
        asked = self._took / np.maximum(self._seconds, LEAST_SECONDS)
        return np.maximum(asked - self._learning / np.maximum(self._others, LEAST_SECONDS), 0.0)

    def _judge(self) -> None:
        takes, brings = self._takes(), self._brought / np.maximum(self._tokens, 1.0)
        unknown = (self._tokens < LEAST_TOKENS) & ~self.resting
        pays = (takes < NEGLIGIBLE) | (brings >= takes) | unknown
        for m in np.flatnonzero(self._asked & (self._trial == 0)).tolist():
            if pays[m]:
                self._rest[m] = RESTS[0]
            elif self.resting[m]:  # its trial has failed
                self._rest[m] = min(2 * self._rest[m], RESTS[1])
            self.resting[m] = not pays[m]

    def ask(self) -> tuple[np.ndarray, bool]:
        """Bool [M]: who is to be asked now; and is the step to be measured?"""
        self._steps += 1
        if not (self.resting.any() or self._trial.any()):
            self._asked = self._all
            return self._asked, self._steps % EVERY == 0
        self._idle[self.resting] += 1
        for m in np.flatnonzero(self.resting & (self._idle >= self._rest)).tolist():
            self._idle[m], self._trial[m] = 0, TRIAL
            # What it brought before it rested says nothing of now.
            for sums in (self._brought, self._tokens, self._took, self._seconds):
                sums[m] = 0.0
        self._asked = ~self.resting | (self._trial > 0)
        self._trial[self._trial > 0] -= 1
        return self._asked, True
