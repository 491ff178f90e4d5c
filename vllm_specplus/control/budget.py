"""Which of the grown nodes are verified in the next step.

All nodes of all requests compete: ranked by survival, the best ``b`` of them are
verified. As a child never survives its parent, the best ``b`` are closed under
parents, and no other choice of ``b`` nodes yields more expected tokens. What
remains is ``b``:

* **goodput** (SmartSpec, arXiv 2406.14066; there with one draft length for the whole
  batch): the ``b`` with the most expected tokens per second of the step. Every ``b``
  is evaluated, since measured step times have steps of their own and no single maximum
  can be assumed. Zero is a legal answer. Where trees cost more than chains, each request's
  best path competes with its tree.
* **threshold** (SpecDec++, arXiv 2405.19715, sec. 3.1): a node is verified while the
  probability that its path holds a rejection, ``1 - survival``, stays below a threshold.
"""

from __future__ import annotations

import numpy as np
from numba import njit


def best_goodput(
    survival: np.ndarray, num_requests: int, seconds: np.ndarray, least: int = 0,
    allowed: np.ndarray | None = None,
) -> tuple[int, float]:  # fmt: skip
    """The most productive number of nodes, and its goodput over that of no nodes.

    ``survival`` float [N] in descending order behind the first ``least``, which are
    verified anyway; ``seconds`` float [N + 1] time of a step that verifies 0..N of them. Each
    of the ``num_requests`` requests outputs one token even undrafted. Ties go to fewer nodes.
    ``allowed`` bool [N + 1]: numbers of nodes to choose from, ``least`` in any case.
    """
    tokens = num_requests + np.concatenate(([0.0], np.cumsum(survival, dtype=np.float64)))
    goodput = tokens / seconds
    choices = goodput[least:]
    if allowed is not None:
        choices = np.where(allowed[least:], choices, 0.0)
        choices[0] = goodput[least]
    best = least + int(np.argmax(choices))
    return best, float(goodput[best] / goodput[0])


@njit(cache=True)
def within_limits(owners, survival, seconds, limits, per_token):
    """Bool [K + 1]: does a step that verifies the first 0..K nodes keep every request's limit?

    ``owners`` int64 [K] request of each node and ``survival`` float [K], in the order in which
    they are taken; ``seconds`` float64 [K + 1] such steps take; ``limits`` float64 [R] seconds that
    a request admits, and ``per_token`` float64 [R] so many more for each token it can expect.
    """
    left = limits.copy()
    least = left.min()
    out = np.empty(owners.shape[0] + 1, np.bool_)
    out[0] = seconds[0] <= least
    for i in range(owners.shape[0]):
        r = owners[i]
        was = left[r]
        left[r] += per_token[r] * survival[i]
        if was <= least:  # it was the one that admits least
            least = left.min()
        out[i + 1] = seconds[i + 1] <= least
    return out


@njit(cache=True)
def most_productive(
    ranked, survival, parents, starts, seconds, least, limits, per_token, ceiling
):  # fmt: skip
    """:func:`best_goodput` within :func:`within_limits` of nodes in some order, in one pass.

    ``ranked`` int64 [K] nodes in that order; ``survival`` float32 [N], ``parents`` int32 [N],
    ``starts`` int32 [R + 1] of all; ``seconds`` float64 [2, >= K + 1] of a step that verifies so
    many nodes as chains and as trees, which they are from the first node on that branches off its
    request's chain; ``least`` nodes are verified anyway; ``limits`` and ``per_token`` float64 [R],
    of no request: [0] where nothing is limited; ``ceiling`` seconds. Returns (best, its goodput
    over that of none, its seconds, would more be productive but for the limits?).
    """
    requests = starts.shape[0] - 1
    owner = np.empty(parents.shape[0], np.int32)
    for r in range(requests):
        owner[starts[r] : starts[r + 1]] = r
    end = np.full(requests, -1, np.int32)  # of each request's chain
    limited = limits.shape[0] > 0
    left = limits.copy()
    smallest = left.min() if limited else np.inf
    tree, tokens, plain = 0, float(requests), requests / seconds[0, 0]
    best, best_goodput = -1, 0.0  # that is allowed
    wanted, wanted_goodput = least, 0.0
    for count in range(ranked.shape[0] + 1):
        if count:
            node = ranked[count - 1]
            r = owner[node]
            if parents[node] != end[r]:
                tree = 1
            end[r] = node - starts[r]
            tokens += survival[node]
            if limited:
                was = left[r]
                left[r] += per_token[r] * survival[node]
                if was <= smallest:  # it was the one that admits least
                    smallest = left.min()
        if count < least:
            continue
        time = seconds[tree, count]
        goodput = tokens / time
        if goodput > wanted_goodput:
            wanted, wanted_goodput = count, goodput
        if (count == least or time <= min(smallest, ceiling)) and goodput > best_goodput:
            best, best_goodput, best_time = count, goodput, time
    return best, best_goodput / plain, best_time, best != wanted


@njit(cache=True)
def best_chains(survival, parents, starts):
    """Bool [N]: is the node on the path of its request with the most expected tokens?

    ``survival`` float32 [N], ``parents`` int32 [N], ``starts`` int32 [R + 1].
    """
    below = survival.copy()  # expected tokens from the node on, along its best path
    follower = np.full(survival.shape[0], -1, np.int32)
    kept = np.zeros(survival.shape[0], np.bool_)
    for r in range(starts.shape[0] - 1):
        first, best = starts[r], -1
        # Children come after their parent.
        for i in range(starts[r + 1] - 1, first - 1, -1):
            if parents[i] < 0:
                if best < 0 or below[i] >= below[best]:
                    best = i
                continue
            parent = first + parents[i]
            if below[parent] <= survival[parent] + below[i]:
                below[parent], follower[parent] = survival[parent] + below[i], i
        while best >= 0:
            kept[best] = True
            best = follower[best]
    return kept


@njit(cache=True)
def keep_nodes(tokens, parents, counts, kept):
    """The subtrees of ``kept`` bool [N] nodes, renumbered: (tokens, parents, counts).

    ``tokens``, ``parents`` int32 [N], ``counts`` int32 [R]. A kept node's parent is kept.
    """
    size = 0
    for i in range(kept.shape[0]):
        size += kept[i]
    out_tokens = np.empty(size, np.int32)
    out_parents = np.empty(size, np.int32)
    out_counts = np.zeros(counts.shape[0], np.int32)
    number = np.empty(kept.shape[0], np.int32)
    first, total = 0, 0
    for r in range(counts.shape[0]):
        for i in range(first, first + counts[r]):
            if kept[i]:
                number[i] = out_counts[r]
                out_tokens[total] = tokens[i]
                out_parents[total] = -1 if parents[i] < 0 else number[first + parents[i]]
                out_counts[r] += 1
                total += 1
        first += counts[r]
    return out_tokens, out_parents, out_counts
