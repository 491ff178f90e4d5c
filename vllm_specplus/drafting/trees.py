"""Operations on draft trees that several methods share: trimming and fusing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numba import njit

from vllm_specplus.control.acceptance import look_up, survivals
from vllm_specplus.step import PROBABILITY_CLASSES, Source, StepContext
from vllm_specplus.tree import DraftBatch

# Nodes proposed by several rules at once are classed by the highest acceptance among them, for
# two rules and for more; their own before anything is learnt (as in retrieval/evidence.py):
_TWO_AGREE = (0.10, 0.17, 0.37, 0.52, 0.67, 0.79, 0.88, 0.96)
_MORE_AGREE = (0.15, 0.25, 0.40, 0.65, 0.75, 0.85, 0.92, 0.97)


@njit(cache=True, nogil=True)
def keep_best(tokens, parents, sources, drawn_from, acceptance, budget, chain, out):
    """Keep the ``budget`` nodes of one tree that most probably survive; returns how many.

    ``tokens``, ``parents``, ``sources``, ``drawn_from`` int32 [N] in topological order. Writes the
    renumbered tree to the four rows of ``out`` int32 [4, >= budget]; ``acceptance`` and ``chain``:
    see :func:`_best_nodes`.
    """
    kept = _best_nodes(parents, sources, drawn_from, acceptance, budget, chain)
    return renumber(kept, (tokens, parents, sources, drawn_from), out)


@njit(cache=True, nogil=True)
def renumber(kept, nodes, out):
    """Write the ``kept`` bool [N] nodes to ``out`` int32 [K, >= N], and return how many they are.

    ``nodes``: K arrays int32 [N], the second of which are their parents, in topological order.
    """
    number = np.empty(kept.shape[0], np.int32)  # in the tree that is kept
    total = 0
    for i in range(kept.shape[0]):
        if kept[i]:
            number[i] = total
            for k in range(len(nodes)):
                out[k, total] = nodes[k][i]
            if out[1, total] >= 0:
                out[1, total] = number[out[1, total]]
            total += 1
    return total


@njit(cache=True, nogil=True)
def _best_nodes(parents, sources, drawn_from, acceptance, budget, chain):
    """Bool [N]: the ``budget`` nodes of one tree that most probably survive.

    ``acceptance`` float32 [1, depths, S]. No node survives its parent, so the best nodes are
    closed under parents. Drawn nodes (``drawn_from`` >= 0, below drawn ones only) go first,
    whatever they are worth. ``chain``: only the best path, child by child. Ties go to the earlier
    node.
    """
    count = parents.shape[0]
    whole = np.array([0, count], np.int32)
    conditional, _ = look_up(parents, sources, whole, acceptance)
    survival = survivals(parents, whole, conditional)
    for i in range(count):
        if drawn_from[i] >= 0:
            survival[i] = 2.0
    kept = np.ones(count, np.bool_)
    if chain:
        kept[:] = False
        node, depth = -1, 0
        while depth < budget:
            best = -1
            for i in range(count):
                if parents[i] == node and (best < 0 or survival[i] > survival[best]):
                    best = i
            if best < 0:
                break
            kept[best] = True
            node, depth = best, depth + 1
    elif count > budget:
        kept[:] = False
        for i in np.argsort(-survival, kind="mergesort")[:budget]:
            kept[i] = True
    return kept


#: A node of a request's tree while trees of several members are inserted into it.
_FUSED = np.dtype(
    [
        ("token", np.int32),
        ("parent", np.int32),
        ("source", np.int32),
        ("drawn_from", np.int32),
        ("best", np.float32),  # highest acceptance by which a member proposes it
        ("depth", np.int32),  # from 1
        ("members", np.int32),  # a bit for each that proposes it
        ("child", np.int32),  # the newest one, -1: none
        ("sibling", np.int32),  # the next older child of the same parent, -1: none
    ]
)


# Inlined: three calls per request with eight arrays each cost a quarter of a small merge.
@njit(cache=True, nogil=True, inline="always")
def _insert(tree, nodes, member, possible, tokens, parents, sources, drawn_from, acceptance):
    """Insert a member's tree into one of ``nodes`` nodes; returns how many it has then.

    ``tree`` _FUSED [> N]: its nodes, and the root as the last one. ``acceptance`` float32
    [depths, S]. Branches go whose first node is not ``possible`` bool [N].
    """
    fused = np.empty(tokens.shape[0], np.int32)  # node of ``tree``, -2: pruned
    for i in range(tokens.shape[0]):
        above = np.int32(-1) if parents[i] < 0 else fused[parents[i]]
        if above == -2 or not possible[i]:
            fused[i] = -2
            continue
        parent = tree[above]
        at = np.int32(-1)
        if drawn_from[i] < 0:
            # The first that holds it: of draws that came again no rule accepts the later ones.
            child = parent.child
            while child >= 0:
                if tree[child].token == tokens[i]:
                    at = child
                child = tree[child].sibling
        p = acceptance[min(parent.depth, acceptance.shape[0] - 1), sources[i]]
        if at < 0:
            at = np.int32(nodes)
            node = tree[at]
            node.token, node.parent, node.source = tokens[i], above, sources[i]
            node.drawn_from, node.best, node.depth = drawn_from[i], p, parent.depth + 1
            node.members, node.child = 1 << member, -1
            node.sibling, parent.child = parent.child, at
            nodes += 1
        else:
            node = tree[at]
            node.best = max(node.best, p)
            node.members |= 1 << member
        fused[i] = at
    return nodes


@njit(cache=True, nogil=True)
def _agreed_source(node, agreement):
    """The source of a node: its own; that of its class if several members propose it, but for
    draws."""
    others = node.members & (node.members - 1)  # but for one
    if not others or node.drawn_from >= 0:
        return node.source
    column = 0
    while node.best > PROBABILITY_CLASSES[column]:
        column += 1
    return agreement + (len(PROBABILITY_CLASSES) if others & (others - 1) else 0) + column


@njit(cache=True, nogil=True)
def merge(
    tokens, parents, sources, drawn_from, possible, counts, acceptance, agreement, max_nodes,
    chain_only, out, out_counts,
):  # fmt: skip
    """Fuse M trees of each request by longest common prefix and trim to the best nodes.

    ``tokens``, ``parents``, ``sources`` int32 [N]: the trees of the first member for all
    requests, then those of the second, ...; ``counts`` int32 [M, R]. ``drawn_from`` int32 [N]:
    >= 0 for nodes that were drawn, by the first member only. All of them stay, also twins,
    with the source they have: what happens to a draw must not depend on what was drawn.
    Others that hold the same token are one with the first of them. Sources and
    ``acceptance`` float32 [R, depths, S] use one numbering, in which the classes of
    agreement begin at ``agreement``. Branches go whose first node is not ``possible`` bool [N].
    Writes to ``out`` int32 [5, >= sum(max_nodes)], last of all a bit for each member that found the
    node, and to ``out_counts`` int32 [R]; returns the total number of nodes.
    """
    members, requests = counts.shape
    begin = np.zeros(members, np.int64)  # of each member's trees, for the current request
    for m in range(1, members):
        begin[m] = begin[m - 1] + counts[m - 1].sum()
    total = 0
    for r in range(requests):
        size = counts[:, r].sum()
        tree, nodes = np.empty(size + 1, _FUSED), 0
        tree[-1].depth, tree[-1].child = 0, -1  # the root
        for m in range(members):
            first, end = begin[m], begin[m] + counts[m, r]
            nodes = _insert(
                tree, nodes, m, possible[first:end], tokens[first:end], parents[first:end],
                sources[first:end], drawn_from[first:end], acceptance[r],
            )  # fmt: skip
            begin[m] = end
        flat = np.empty((5, nodes), np.int32)
        for i in range(nodes):
            node = tree[i]
            flat[0, i], flat[1, i], flat[4, i] = node.token, node.parent, node.members
            flat[2, i], flat[3, i] = _agreed_source(node, agreement), node.drawn_from
        kept = _best_nodes(
            flat[1], flat[2], flat[3], acceptance[r : r + 1], max_nodes[r], chain_only[r]
        )
        out_counts[r] = renumber(
            kept, (flat[0], flat[1], flat[2], flat[3], flat[4]), out[:, total:]
        )
        total += out_counts[r]
    return total


class Fusion:
    """Several drafts of the same requests made one, with a common list of sources.

    A node that several members propose is verified once. It is better evidence than
    either alone, so it gets a source of its own, by how many agree and how good the
    best of them is. Only the first member may draw its nodes.
    """

    def __init__(self, members: Sequence[Sequence[Source]]):
        """``members``: each one's sources."""
        self.offsets = np.cumsum([0] + [len(sources) for sources in members])
        self.agreement = int(self.offsets[-1])
        self.sources = tuple(s for sources in members for s in sources) + _agreement_sources()
        self._out = np.empty((5, 0), np.int32)
        self.finders = self._out[4]
        """int32 [N] of the nodes fused last, a bit for each member that found them."""

    def fuse(
        self, drafts: Sequence[DraftBatch], step: StepContext, possible: np.ndarray | None = None
    ) -> DraftBatch:
        """One tree per request, of at most ``step.max_nodes`` nodes.

        ``step.acceptance`` is that of :attr:`sources`; ``possible`` bool [N] of all nodes of
        ``drafts``, back to back: branches go whose first node is not (None: all are). The result
        lives until the next call.
        """
        only = self._only(drafts, step) if possible is None else None
        if only is not None:
            return only
        capacity = int(step.max_nodes.sum())
        if self._out.shape[1] < capacity:
            self._out = np.empty((5, capacity), np.int32)
        counts = np.empty(len(step.num_tokens), np.int32)
        total = merge(
            np.concatenate([d.tokens for d in drafts]),
            np.concatenate([d.parents for d in drafts]),
            np.concatenate([d.sources + o for d, o in zip(drafts, self.offsets, strict=False)]),
            np.concatenate([_drawn_from(d) for d in drafts]),
            np.ones(sum(len(d.tokens) for d in drafts), bool) if possible is None else possible,
            np.stack([d.counts for d in drafts]), step.acceptance, self.agreement,
            step.max_nodes, step.chain_only, self._out, counts,
        )  # fmt: skip
        tokens, parents, sources, drawn_from, self.finders = self._out[:, :total]
        draft_probs = drafts[0].draft_probs
        return DraftBatch(
            tokens,
            parents,
            counts,
            sources,
            draft_probs=draft_probs,
            drawn_from=None if draft_probs is None else drawn_from,
        )

    def _only(self, drafts: Sequence[DraftBatch], step: StepContext) -> DraftBatch | None:
        """The drafts of the only member that has some, if they may stay as they are."""
        having = [m for m, draft in enumerate(drafts) if len(draft.tokens)]
        if len(having) != 1 or drafts[0].draft_probs is not None or step.chain_only.any():
            return None
        draft = drafts[having[0]]
        if (draft.counts > step.max_nodes).any():
            return None
        self.finders = np.full(len(draft.tokens), 1 << having[0], np.int32)
        return replace(draft, sources=draft.sources + np.int32(self.offsets[having[0]]))


def _drawn_from(drafts: DraftBatch) -> np.ndarray:
    return (
        np.full(len(drafts.tokens), -1, np.int32)
        if drafts.drawn_from is None
        else drafts.drawn_from
    )


def _agreement_sources() -> tuple[Source, ...]:
    return tuple(
        Source(f"{who} agree, best up to {high}", "agreement", prior)
        for who, priors in (("two", _TWO_AGREE), ("more", _MORE_AGREE))
        for high, prior in zip(PROBABILITY_CLASSES, priors, strict=True)
    )
