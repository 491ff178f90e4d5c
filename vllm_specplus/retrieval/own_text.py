"""Where the last tokens of a growing text occurred in it before.

Prompt lookup asks at every step for the longest earlier occurrence of the text's own suffix.
Searching the text for it takes as long as the text is; here a text is read once, token by token,
into a trie of its contexts read backwards: the node of ``a b`` stands for all places where the
text reads ``b a``, and knows the last of them. Putting a token in follows its context down the
trie, and where that leaves what has been there before is the answer.

A node is divided only where contexts in it differ, so a text has a few nodes per token, of 24
bytes each with their entry in the hash table that finds them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_specplus.step import StepContext

_NODE = np.dtype(
    [
        ("parent", np.int32),
        ("token", np.int32),  # with which the context goes on, backwards
        ("last", np.int32),  # the last place of this context
        ("divided", np.int32),  # 0: all places in it have the same context, to its full length
    ]
)
#: The least number of nodes to make room for.
FEWEST = 64


@njit(cache=True)
def _entry(nodes, table, parent, token):
    """Where in ``table`` the child of ``parent`` by ``token`` is, or would be: there is a 0."""
    mask = table.shape[0] - 1
    h = np.uint64(parent) * np.uint64(0x9E3779B97F4A7C15)
    h ^= np.uint64(token) * np.uint64(0xC2B2AE3D27D4EB4F)
    h ^= h >> np.uint64(29)
    at = np.int64(h & np.uint64(mask))
    while table[at] != 0:
        node = nodes[table[at]]
        if node.parent == parent and node.token == token:
            break
        at = (at + 1) & mask
    return at


@njit(cache=True)
def _add(nodes, table, count, parent, token, last):
    node = nodes[count]
    node.parent, node.token, node.last, node.divided = parent, token, last, 0
    table[_entry(nodes, table, parent, token)] = count


@njit(cache=True)
def _read(nodes, table, count, text, i, longest):
    """Read token ``i`` of ``text``; returns (nodes then, its context's last earlier place,
    length)."""
    at, depth, place, length = 0, 0, -1, 0
    while True:
        node = nodes[at]
        if depth:
            place, length = node.last, depth
        if depth and (depth == longest or not node.divided):
            break
        node.last = i
        if depth > i:
            return count, place, length
        child = table[_entry(nodes, table, at, text[i - depth])]
        if not child:
            _add(nodes, table, count, at, text[i - depth], i)
            return count + 1, place, length
        at, depth = child, depth + 1
    # A node whose places all have one context: divided where this one differs from it.
    while length < longest and length <= min(i, place) and text[i - length] == text[place - length]:
        length += 1
    nodes[at].last = i
    if length < longest:
        for d in range(depth, length):
            nodes[at].divided = 1
            _add(nodes, table, count, at, text[i - d], i)
            at, count = count, count + 1
        nodes[at].divided = 1
        for here in (place, i):
            if length <= here:
                _add(nodes, table, count, at, text[here - length], here)
                count += 1
    return count, place, length


@njit(cache=True)
def _extend(nodes, table, count, text, first, end, longest):
    """Read the tokens ``first`` to ``end`` as far as there is room for nodes; returns (nodes then,
    where it stopped, place and length of the last one read)."""
    place, length = -1, 0
    for i in range(first, end):
        if count + longest + 1 > nodes.shape[0]:
            return count, i, place, length
        count, place, length = _read(nodes, table, count, text, i, longest)
    return count, end, place, length


@njit(cache=True)
def _fill(nodes, count, table):
    """Enter the nodes into an empty table."""
    for i in range(1, count):
        table[_entry(nodes, table, nodes[i].parent, nodes[i].token)] = i


class OwnText:
    """One text that grows."""

    def __init__(self, longest: int):
        """``longest``: tokens of a match, at most."""
        self._longest = longest
        self.known = 0
        """Tokens that were read."""
        self.match = (-1, 0)
        """(position after the match, its length) of the longest earlier occurrence of a suffix,
        the most recent one among equals; (-1, 0) if there is none."""
        self._make_room(FEWEST)
        self._nodes[0] = (0, 0, 0, 1)  # the root, which all places are in
        self._count = 1

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self._nodes.nbytes + self._table.nbytes

    def read(self, text: np.ndarray, length: int) -> None:
        """Read on in ``text`` int32, of ``length`` tokens by now."""
        while self.known < length:
            self._count, self.known, place, size = _extend(
                self._nodes, self._table, self._count, text, self.known, length, self._longest
            )
            if self.known < length:
                self._make_room(2 * len(self._nodes))
                _fill(self._nodes, self._count, self._table)
            else:
                self.match = (place + 1, size) if size else (-1, 0)

    def _make_room(self, size: int) -> None:
        nodes = np.empty(size, _NODE)
        if size > FEWEST:
            nodes[: self._count] = self._nodes[: self._count]
        self._nodes, self._table = nodes, np.zeros(2 * size, np.int32)


class OwnTexts:
    """The texts of all requests that draft."""

    def __init__(self, longest: int):
        self._longest = longest
        # Request -> (version of its text, what was read of it).
        self._texts: dict[str, tuple[int, OwnText]] = {}

    def matches(self, step: StepContext) -> np.ndarray:
        """int32 [R, 2] ``OwnText.match`` of every request that may draft, of others (-1, 0)."""
        out = np.empty((len(step.request_ids), 2), np.int32)
        out[:] = (-1, 0)
        for r in np.flatnonzero(step.max_nodes > 0).tolist():
            length = int(step.num_tokens[r])
            text = self._text(step, r)
            text.read(step.token_ids[r], length)
            out[r] = text.match
        return out

    def _text(self, step: StepContext, r: int) -> OwnText:
        """What is known of a request's text, nothing where it may have changed."""
        if step.versions is None:
            return OwnText(self._longest)
        name, version = step.request_ids[r], int(step.versions[r])
        known, text = self._texts.get(name, (-1, None))
        if text is None or known != version:
            text = OwnText(self._longest)
            self._texts[name] = version, text
        return text

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        self._texts.pop(request_id, None)
