"""How probable it is that a drafted node becomes text.

Every node names its *source*, the rule of its method that proposed it ("rank 2 of a
two-token row", "continuation of a match of 5 tokens"). The conditional acceptance
``P(node is accepted | its parent was)`` is estimated per source and depth over all
requests of a cache salt, as a decayed frequency that starts from the method's measured prior; each
request adds an offset in log-odds per group of sources, which follows how predictable
*its* text is right now. A node's *survival* is the product along its path, and the
expected output of a step is one token per request plus the survival of its nodes.

Labels come from the text: a drafted node is observed once the token at its position is
known and its parent's token was right, whether or not the target verified the node.
Drafts that were grown but not verified therefore teach for free, and an engine that
has stopped speculating notices when it would pay again. Nodes below a wrong token are
never labelled: nothing was observed there. (True for deterministic drafts, whose
acceptance is the target drawing the same token.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from vllm_specplus.control.salts import SaltTables
from vllm_specplus.control.slots import RequestSlots
from vllm_specplus.step import DEPTHS, Source, prior_tables

#: The prior counts like this many observations, and fades like them.
PRIOR_WEIGHT = 10.0
#: Estimates stay this far from certainty, where log-odds would end.
MARGIN = 1e-4
#: Each observation weighs 1 % less than the next: a change of traffic is followed
#: within some hundred observations.
DECAY = 0.99
#: Offsets of requests: prior variance in squared log-odds, and memory per observation.
OFFSET_VARIANCE = 1.0
OFFSET_DECAY = 0.98


@njit(cache=True)
def label_nodes(tokens, parents, text, drafted_at, known):
    """Which nodes of one tree has the text decided, and how?

    ``tokens``, ``parents`` int32 [N] of a tree whose root is ``text[drafted_at - 1]``;
    ``known`` tokens of ``text`` are known by now. Returns ``labels`` int8 [N]: 1 on the
    text, 0 refuted by it, -1 not observed; and ``depths`` int32 [N], from 1.
    """
    count = tokens.shape[0]
    labels = np.full(count, -1, np.int8)
    depths = np.empty(count, np.int32)
    for i in range(count):
        parent = parents[i]
        depths[i] = 1 if parent < 0 else depths[parent] + 1
        position = drafted_at + depths[i] - 1
        if position < known and (parent < 0 or labels[parent] == 1):
            labels[i] = tokens[i] == text[position]
    return labels, depths


@njit(cache=True)
def look_up(parents, sources, starts, acceptance):
    """Conditional acceptance float32 [N] and depth int32 [N], from 1, of every node.

    ``parents``, ``sources`` int32 [N]; ``starts`` int32 [R + 1] first node of each
    request; ``acceptance`` float32 [R, DEPTHS, S].
    """
    out = np.empty(parents.shape[0], np.float32)
    depths = np.empty(parents.shape[0], np.int32)
    deepest = acceptance.shape[1]
    for r in range(starts.shape[0] - 1):
        for i in range(starts[r], starts[r + 1]):
            depths[i] = 1 if parents[i] < 0 else depths[starts[r] + parents[i]] + 1
            out[i] = acceptance[r, min(depths[i], deepest) - 1, sources[i]]
    return out, depths


@njit(cache=True)
def survivals(parents, starts, acceptance):
    """Product of ``acceptance`` float32 [N] along every node's path, float32 [N]."""
    out = acceptance.copy()
    for r in range(starts.shape[0] - 1):
        for i in range(starts[r], starts[r + 1]):
            if parents[i] >= 0:
                out[i] *= out[starts[r] + parents[i]]
    return out


@njit(cache=True)
def expected_tokens(survival, kept, starts):
    """float64 [R]: sum over each request's ``kept`` bool [N] nodes of ``survival`` [N]."""
    out = np.zeros(starts.shape[0] - 1)
    for r in range(starts.shape[0] - 1):
        for i in range(starts[r], starts[r + 1]):
            if kept[i]:
                out[r] += survival[i]
    return out


@njit(cache=True)
def _odds(hits, trials):
    p = min(max(hits / trials, MARGIN), 1.0 - MARGIN)
    return p / (1.0 - p)


@njit(cache=True)
def _learn(
    tokens, parents, sources, starts, drafted_at, rows, slots, salts, token_ids, num_tokens,
    all_hits, all_trials, groups, offsets, information,
):  # fmt: skip
    """Label the trees of all requests that are still here (``rows`` >= 0) and update."""
    observed = 0
    for r in range(starts.shape[0] - 1):
        first, end = starts[r], starts[r + 1]
        if rows[r] < 0 or first == end:
            continue
        text, slot = token_ids[rows[r]], slots[r]
        hits, trials = all_hits[salts[r]], all_trials[salts[r]]
        labels, depths = label_nodes(
            tokens[first:end], parents[first:end], text, drafted_at[r], num_tokens[rows[r]]
        )
        for i in range(end - first):
            if labels[i] < 0:
                continue
            observed += 1
            d, s = min(depths[i], hits.shape[0]) - 1, sources[first + i]
            odds = _odds(hits[d, s], trials[d, s])
            hits[d, s] = DECAY * hits[d, s] + labels[i]
            trials[d, s] = DECAY * trials[d, s] + 1.0
            # One Newton step of the request's log-likelihood; without news the offset
            # decays to its prior mean, 0.
            g = groups[s]
            odds *= np.exp(offsets[slot, g])
            p = odds / (1.0 + odds)
            information[slot, g] = OFFSET_DECAY * information[slot, g] + p * (1.0 - p)
            pull = (1.0 - OFFSET_DECAY) * offsets[slot, g] / OFFSET_VARIANCE
            offsets[slot, g] += (labels[i] - p - pull) / (
                information[slot, g] + 1.0 / OFFSET_VARIANCE
            )
    return observed


@njit(cache=True)
def _tables(hits, trials, groups, offsets, slots, salts, out):
    """out[r, d, s]: conditional acceptance for the request in ``slots[r]`` (-1: none), of the salt
    whose row is ``salts[r]``."""
    factors = np.ones((slots.shape[0], offsets.shape[1]))
    for r in range(slots.shape[0]):
        if slots[r] >= 0:
            factors[r] = np.exp(offsets[slots[r]])
    for d in range(hits.shape[1]):
        for s in range(hits.shape[2]):
            for r in range(slots.shape[0]):
                odds = _odds(hits[salts[r], d, s], trials[salts[r], d, s])
                conditional_odds = odds * factors[r, groups[s]]
                out[r, d, s] = conditional_odds / (1.0 + conditional_odds)


class AcceptanceEstimator:
    """Conditional acceptance by source and depth, per cache salt and per request."""

    def __init__(self, sources: Sequence[Source]):
        for source in sources:
            if not 0.0 < source.prior < 1.0:
                raise ValueError(f"source {source.name!r}: prior {source.prior} is not in (0, 1)")
        self.sources = tuple(sources)
        names = list(dict.fromkeys(source.group for source in sources))
        self._groups = np.array([names.index(source.group) for source in sources], np.int32)
        hits = PRIOR_WEIGHT * prior_tables(sources, 1)[0].astype(np.float64)
        # Hits and trials float64 [salts, DEPTHS, S].
        self._frequencies = SaltTables(hits, np.full_like(hits, PRIOR_WEIGHT))
        # Of each request: its offsets, and how much is known about them.
        self._requests = RequestSlots((len(names),), (len(names),))

    def learn(
        self,
        tokens: np.ndarray,
        parents: np.ndarray,
        sources: np.ndarray,
        starts: np.ndarray,
        drafted_at: np.ndarray,
        request_ids: Sequence[str],
        rows: np.ndarray,
        token_ids: np.ndarray,
        num_tokens: np.ndarray,
        cache_salts: Sequence[str] | None = None,
    ) -> int:
        """Learn from trees drafted earlier; returns the number of labelled nodes.

        The trees: ``tokens``, ``parents``, ``sources`` int32 [N], ``starts`` int32
        [R + 1], ``drafted_at`` int32 [R] tokens known when they were drafted, for
        ``request_ids`` [R]. The texts by now: ``token_ids`` int32 [B, max_len],
        ``num_tokens`` int32 [B], ``cache_salts`` [B]; ``rows`` int32 [R] finds a request there,
        -1 = gone.
        """
        # A request that is gone must not take a slot again: nobody would forget it.
        slots = np.array(
            [
                self._requests.take(name) if row >= 0 else -1
                for name, row in zip(request_ids, rows, strict=True)
            ],
            np.int32,
        )
        # What is gone reads some row, and teaches nothing.
        salts = self._frequencies.rows_of(cache_salts, len(num_tokens))[rows]
        return _learn(
            tokens, parents, sources, starts, drafted_at, rows, slots, salts, token_ids, num_tokens,
            *self._frequencies.arrays, self._groups, *self._requests.arrays,
        )  # fmt: skip

    def tables(
        self, request_ids: Sequence[str], cache_salts: Sequence[str] | None = None
    ) -> np.ndarray:
        """Float32 [R, DEPTHS, S] conditional acceptance of each source for requests of
        ``cache_salts`` [R], now."""
        slots = self._requests.find(request_ids)
        out = np.empty((len(slots), DEPTHS, len(self.sources)), np.float32)
        salts = self._frequencies.rows_of(cache_salts, len(slots))
        offsets = self._requests.arrays[0]
        _tables(*self._frequencies.arrays, self._groups, offsets, slots, salts, out)
        return out

    def forget(self, request_id: str) -> None:
        """The request is gone; its offsets may serve another one."""
        self._requests.forget(request_id)
