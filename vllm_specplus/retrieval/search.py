"""Longest-suffix search in a datastore, compiled; the interpreter lock is released.

A match is a range of ``order`` per shard: all positions after which the text goes on as
the context did. Reading is bounds-checked throughout: what is on disk may be anything.
"""

from __future__ import annotations

import numpy as np
from numba import njit

#: Positions followed per query, taken evenly over all matches.
SAMPLES = 64
#: Few matches are followed far, many only as deep as a budget reaches.
FARTHEST, NEAREST, TOTAL = 32, 8, 256


@njit(cache=True, nogil=True)
def _compare(tokens, base, position, text, n, most):
    """(sign, length): how the text read backwards from ``position`` of the shard at
    ``base`` compares with the context read backwards, over ``most`` tokens."""
    for k in range(most):
        if position < k:
            return -1, k
        stored = np.int64(tokens[base + position - k])
        wanted = np.int64(text[n - 1 - k])
        if stored != wanted:
            return (-1 if stored < wanted else 1), k
    return 0, most


@njit(cache=True, nogil=True)
def _bound(tokens, order, shard, low, high, text, n, most, upper):
    """First index in [low, high) of a shard's part of ``order`` not below (``upper``: above) the
    context's last ``most`` tokens read backwards. ``shard`` int64 [4]."""
    base, size, part = shard[0], shard[1] - shard[0], shard[2]
    while low < high:
        middle = (low + high) // 2
        position = np.int64(order[part + middle])
        sign = 1
        if position < size:
            sign, _ = _compare(tokens, base, position, text, n, most)
        if sign < 0 or (upper and sign == 0):
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _of_token(first, shard, token):
    """[low, high) of a shard's part of ``order``: the places of ``token``."""
    row, size = shard[3], shard[1] - shard[0]
    return np.int64(first[row, token]), min(np.int64(first[row, token + 1]), size)


@njit(cache=True, nogil=True)
def longest_match(tokens, order, first, shards, text, n, shortest, longest, ranges):
    """Length of the longest suffix of ``text[:n]``, of at most ``longest`` tokens, that the
    datastore holds, 0 if shorter than ``shortest``.

    Arrays as in :class:`~vllm_specplus.retrieval.datastore.Datastore`. Writes to
    ``ranges`` int64 [shards, 2] which part of each shard's ``order`` matches.
    """
    ranges[:] = 0
    newest = np.int64(text[n - 1])
    if newest < 0 or newest >= first.shape[1] - 1:
        return 0
    most = min(longest, n)
    best = 0
    found = np.zeros(shards.shape[0], np.int64)
    for s in range(shards.shape[0]):
        shard = shards[s]
        low, high = _of_token(first, shard, newest)
        if low >= high:
            continue
        rank = _bound(tokens, order, shard, low, high, text, n, most, False)
        # The longest match is next to where the context would stand.
        for i in range(max(rank - 1, low), min(rank + 1, high)):
            position = np.int64(order[shard[2] + i])
            if position < shard[1] - shard[0]:
                _, length = _compare(tokens, shard[0], position, text, n, most)
                found[s] = max(found[s], length)
        best = max(best, found[s])
    if best < shortest:
        return 0
    for s in range(shards.shape[0]):
        if found[s] == best:
            low, high = _of_token(first, shards[s], newest)
            low = _bound(tokens, order, shards[s], low, high, text, n, best, False)
            ranges[s, 0] = low
            ranges[s, 1] = _bound(tokens, order, shards[s], low, high, text, n, best, True)
    return best


@njit(cache=True, nogil=True)
def continuations_trie(
    tokens, order, shards, vocab_size, ranges, most, deepest, node_tokens, node_parents,
    node_weights,
):  # fmt: skip
    """Trie of what follows the matches in ``ranges``: (nodes, continuations followed).

    A node's weight is the number of continuations that pass through it. Of more than ``most``
    matches an even sample is followed, not the first ones, whose contexts would
    be alike; each ``deepest`` tokens far (0: the further, the fewer they are). Nodes are written in
    topological order to int32 arrays.
    """
    matches = np.int64(0)
    for s in range(ranges.shape[0]):
        matches += ranges[s, 1] - ranges[s, 0]
    followed = min(matches, most)
    if followed == 0:
        return 0, 0
    if deepest == 0:
        deepest = min(max(TOTAL // followed, NEAREST), FARTHEST)
    first_child = np.full(node_tokens.shape[0] + 1, -1, np.int32)  # of node - 1; 0 is the root
    sibling = np.full(node_tokens.shape[0], -1, np.int32)
    nodes = 0
    for i in range(followed):
        match = i * matches // followed
        s = 0
        while match >= ranges[s, 1] - ranges[s, 0]:
            match -= ranges[s, 1] - ranges[s, 0]
            s += 1
        base, size = shards[s, 0], shards[s, 1] - shards[s, 0]
        position = np.int64(order[shards[s, 2] + ranges[s, 0] + match]) + 1
        node = -1
        for ahead in range(position, min(position + deepest, size)):
            token = np.int64(tokens[base + ahead])
            if token >= vocab_size:  # a separator, or damage
                break
            child = first_child[node + 1]
            while child >= 0 and node_tokens[child] != token:
                child = sibling[child]
            if child < 0:
                if nodes == node_tokens.shape[0]:
                    break
                child = nodes
                node_tokens[nodes], node_parents[nodes], node_weights[nodes] = token, node, 0
                sibling[nodes] = first_child[node + 1]
                first_child[node + 1] = nodes
                nodes += 1
            node_weights[child] += 1
            node = child
    return nodes, followed


@njit(cache=True, nogil=True)
def heaviest(tokens, parents, weights, depths, choices):
    """Bool [N]: the nodes of a trie that REST's code verifies (its ``cut_to_choices``).

    The ``choices`` heaviest ones, the shorter first among equals; then the longest of them go, the
    lightest first, until all their paths together count no more than ``choices`` distinct tokens,
    each path its own. N nodes in topological order, ``depths`` from 1.
    """
    kept = np.zeros(tokens.shape[0], np.bool_)
    # Both sorts are stable, and weights are below 2^24: one key for weight and depth.
    by_weight = np.argsort(
        depths.astype(np.int64) - (weights.astype(np.int64) << 32), kind="mergesort"
    )
    kept[by_weight[:choices]] = True
    distinct = np.zeros(tokens.shape[0], np.int64)
    size = 0
    for i in np.flatnonzero(kept):
        node = i
        while node >= 0:
            above = parents[node]
            while above >= 0 and tokens[above] != tokens[node]:
                above = parents[above]
            distinct[i] += above < 0  # no token nearer to the root is the same
            node = parents[node]
        size += distinct[i]
    by_depth = np.argsort(-depths[by_weight[::-1]], kind="mergesort")
    for i in by_weight[::-1][by_depth]:
        if size <= choices:
            break
        if kept[i]:
            kept[i] = False
            size -= distinct[i]
    return kept
