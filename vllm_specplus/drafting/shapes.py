"""Tree shapes: which tokens the next level of every tree holds.

A shape sees, level by level, the draft's distribution ``q`` at the nodes it last added
(first: at the root) and returns the next level. Draws without replacement are made one by
one from the cumulated ``q`` (:func:`draw`), which needs a handful of random numbers where
Gumbel-Top-k needs one per token of the vocabulary. Greedy requests get the most probable
tokens instead.

How many nodes a level has never depends on what was drawn. That is part of what makes
verification lossless: see ``samplers/sampled.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

#: Stands for log 0 where infinities would make NaNs.
IMPOSSIBLE = -1e9
#: SWIFT's classes of the probability of a level's first token, from above, and how many nodes the
#: level has then: of a greedy request, and of one whose nodes are drawn.
CATERPILLAR_CLASSES = (0.95, 0.8, 0.5)
CATERPILLAR_WIDTHS = ((3, 5, 8, 10), (1, 3, 5, 10))
CATERPILLAR_LEAST = 3


@dataclass(slots=True)
class Level:
    """``w`` new nodes in each of R trees."""

    tokens: torch.Tensor
    """int64 [R, w]; siblings in draw order."""
    parents: torch.Tensor
    """int64 [R, w] indices in the level before; 0 is the root in the first. Also the row of
    ``q`` that each token was drawn from."""
    kept: np.ndarray | None = None
    """int64 [R] so many of them are verified, the first ones; None: all."""


class Shape(ABC):
    """One drafting round over R trees."""

    def __init__(self, sizes: tuple[int, ...], greedy: torch.Tensor):
        """``sizes``: nodes of each level; ``greedy`` bool [R]: requests without noise."""
        self.sizes = sizes
        self.greedy = greedy

    @abstractmethod
    def expand(self, q: torch.Tensor, noise: torch.Tensor) -> Level:
        """The next level. ``q`` float32 [R, w, V] at the nodes of the last one ([R, 1, V]
        first); ``noise`` float64 [R, n], uniform in [0, 1), n from :meth:`noise_size`."""

    goes_on_from: int | None = None
    """How many nodes of a level, its first ones, have children; None: all may."""

    def noise_size(self, nodes: int) -> int:
        """Random numbers per request to expand a level of ``nodes`` nodes."""
        return 0

    def select(self, keep: torch.Tensor) -> None:
        """Go on with the trees ``keep`` int64 [A] only: the others are complete."""
        self.greedy = self.greedy[keep]


def draw(q: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens without replacement, in order: (tokens int64, left float64), [..., k].

    ``q`` float32 [..., V]; ``noise`` float64 [..., k]. ``left``: the probability that was
    not yet drawn before each draw. Where nothing is left, the first token comes again, which
    every verification rejects: it has been removed from both distributions by then.
    """
    cdf = q.cumsum(-1, dtype=torch.float64)
    left = cdf[..., -1:]
    starts = torch.empty_like(noise)  # of the drawn tokens' intervals, ascending
    sizes = torch.empty_like(noise)
    tokens, lefts = [], []
    for k in range(noise.shape[-1]):
        # A point of what is left, moved over the holes before it.
        point = noise[..., k : k + 1] * left
        for hole in range(k):
            start, size = starts[..., hole : hole + 1], sizes[..., hole : hole + 1]
            point = torch.where(point >= start, point + size, point)
        token = torch.searchsorted(cdf, point, right=True).clamp(max=q.shape[-1] - 1)
        size = q.gather(-1, token).double()
        if k:
            empty = (left <= 0) | (size <= 0)
            token = torch.where(empty, tokens[0], token)
            size = torch.where(empty, 0.0, size)
        tokens.append(token)
        lefts.append(left)
        starts[..., k : k + 1], sizes[..., k : k + 1] = cdf.gather(-1, token) - size, size
        order = starts[..., : k + 1].argsort(-1)
        starts[..., : k + 1] = starts[..., : k + 1].gather(-1, order)
        sizes[..., : k + 1] = sizes[..., : k + 1].gather(-1, order)
        left = (left - size).clamp(min=0)
    return torch.cat(tokens, -1), torch.cat(lefts, -1)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x.log(), IMPOSSIBLE)


class ConstantBranching(Shape):
    """RSD-C (Jeon et al., arXiv 2402.14160): every node of a level gets the same number of
    children, drawn without replacement."""

    def __init__(self, branching: tuple[int, ...], greedy: torch.Tensor):
        sizes = (math.prod(branching[: depth + 1]) for depth in range(len(branching)))
        super().__init__(tuple(sizes), greedy)
        self._left = list(branching)

    def noise_size(self, nodes):
        return nodes * self._left[0]

    def expand(self, q, noise):
        branching = self._left.pop(0)
        tokens, _ = draw(q, noise.view(*q.shape[:2], branching))
        best = q.topk(branching, -1).indices
        tokens = torch.where(self.greedy[:, None, None], best, tokens)
        parents = torch.arange(q.shape[1], device=q.device).repeat_interleave(branching)
        return Level(tokens.flatten(1), parents.expand(q.shape[0], -1))


class StochasticBeam(Shape):
    """RSD-S (Jeon et al., arXiv 2402.14160): stochastic beam search (arXiv 1903.06059).

    A level is a sample without replacement of ``width`` sequences, by their probability
    under the draft. All nodes are verified, also those whose beam dies. Width 1 is the
    sampled chain.

    The papers perturb log-probabilities by Gumbel noise. The same law as a race: with
    T = exp(-G) of a perturbed log-probability G, sequences arrive at rates equal to their
    probabilities. A beam's first child arrives when the beam does; after each arrival the
    next takes an exponential time at the rate of what is left below the beam. The earliest
    ``width`` arrivals of a level are kept, in that order.
    """

    def __init__(self, width: int, depth: int, greedy: torch.Tensor):
        super().__init__((width,) * depth, greedy)
        one = torch.ones(len(greedy), 1, dtype=torch.float64, device=greedy.device)
        self._probability = self._arrival = one  # of every beam

    def noise_size(self, nodes):
        return 2 * nodes * self.sizes[0]

    def expand(self, q, noise):
        width = self.sizes[0]
        which, when = noise.view(len(q), 2, q.shape[1], width).unbind(1)
        tokens, left = draw(q, which)
        likely = q.topk(width, -1)
        greedy = self.greedy[:, None, None]
        tokens = torch.where(greedy, likely.indices, tokens)
        probability = self._probability[..., None] * q.gather(-1, tokens)
        waits = -torch.log1p(-when) / (self._probability[..., None] * left)
        waits[..., 0] = 0.0
        arrival = self._arrival[..., None] + waits.cumsum(-1)
        # Without noise: the ordinary beam search, the most probable first.
        arrival = torch.where(greedy, 1.0 / probability, arrival)
        self._arrival, best = arrival.flatten(1).topk(width, -1, largest=False)
        self._probability = probability.flatten(1).gather(1, best)
        return Level(tokens.flatten(1).gather(1, best), best // width)

    def select(self, keep):
        super().select(keep)
        self._probability, self._arrival = self._probability[keep], self._arrival[keep]


class IndependentPaths(Shape):
    """SpecTr (Sun et al., arXiv 2310.15141): ``width`` independent sampled paths.

    A path that agrees with an earlier one so far hangs below that one's nodes; its own
    node stays in the tree, as the leaf that makes the draw count.
    """

    def __init__(self, width: int, depth: int, greedy: torch.Tensor):
        super().__init__((width,) * depth, greedy)
        # Where each path stands: an index in the last level.
        self._node = torch.zeros(len(greedy), width, dtype=torch.int64, device=greedy.device)

    def noise_size(self, nodes):
        return self.sizes[0]

    def expand(self, q, noise):
        parents = self._node
        at = q.gather(1, parents[..., None].expand(-1, -1, q.shape[2]))
        tokens = draw(at, noise[..., None])[0].squeeze(-1)
        tokens = torch.where(self.greedy[:, None], at.argmax(-1), tokens)
        same = (parents[:, :, None] == parents[:, None]) & (tokens[:, :, None] == tokens[:, None])
        self._node = same.to(torch.int8).argmax(-1)  # the first path that agrees with each
        return Level(tokens, parents)

    def select(self, keep):
        super().select(keep)
        self._node = self._node[keep]


class BestFirst(Shape):
    """The most probable sequences: beams by cumulative probability, as EAGLE-2 grows its
    trees (arXiv 2406.16858). Deterministic, at any temperature.

    The tree that is verified is chosen at the end among all that was seen, expanded or
    not: see :meth:`best`.
    """

    def __init__(self, width: int, depth: int, greedy: torch.Tensor):
        super().__init__((width,) * depth, greedy)
        self._phi = torch.zeros(len(greedy), 1, device=greedy.device)
        self._index = torch.full_like(self._phi, -1, dtype=torch.int64)
        self._trees = torch.arange(len(greedy), device=greedy.device)
        self._seen: list[tuple[torch.Tensor, ...]] = []
        self._count = 0

    def expand(self, q, noise):
        width = self.sizes[len(self._seen)]
        best, tokens = q.topk(width, -1)
        phi = (self._phi[..., None] + _log(best)).flatten(1)
        tokens = tokens.flatten(1)
        parents = self._index.repeat_interleave(width, 1)
        self._seen.append((self._trees, phi, tokens, parents))
        self._phi, best = phi.topk(width, -1)
        self._index = self._count + best
        self._count += phi.shape[1]
        return Level(tokens.gather(1, best), best // width)

    def select(self, keep):
        super().select(keep)
        self._phi, self._index = self._phi[keep], self._index[keep]
        self._trees = self._trees[keep]

    def best(
        self, counts: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """The ``counts`` int [R] most probable nodes of every tree, by the probability of
        their path: (tokens, parents), int32 [counts[r]] each, and the probability of each
        node given its parent, float32 [counts[r]]."""
        tokens, parents, probabilities = [], [], []
        flat = [
            torch.stack((trees[:, None].expand_as(ids), ids, above)).flatten(1)
            for trees, _, ids, above in self._seen
        ]
        # Two copies, for which the device is waited for.
        trees, all_ids, all_above = torch.cat(flat, 1).cpu().numpy()
        all_phi = torch.cat([phi.flatten() for _, phi, *_ in self._seen]).cpu().numpy()
        for tree, count in enumerate(counts.tolist()):
            at = trees == tree
            phi, ids, above = all_phi[at], all_ids[at], all_above[at]
            # A parent is never less probable than its child, and comes first among equals.
            chosen = np.argsort(-phi, kind="stable")[:count]
            renumbered = np.full(len(phi) + 1, -1)  # the last one is the root's
            renumbered[chosen] = np.arange(len(chosen))
            tokens.append(ids[chosen].astype(np.int32))
            parents.append(renumbered[above[chosen]].astype(np.int32))
            of_parents = np.append(phi, np.float32(0))[above[chosen]]
            probabilities.append(np.exp(phi[chosen] - of_parents))
        return tokens, parents, probabilities


class Beams(BestFirst):
    """The same of levels of unequal ``sizes`` (LongSpec, arXiv 2502.17421)."""

    def __init__(self, sizes: tuple[int, ...], greedy: torch.Tensor):
        super().__init__(1, len(sizes), greedy)
        self.sizes = sizes


class Caterpillar(Shape):
    """SWIFT's tree (arXiv 2410.06916, section 4.3): a chain, and leaves beside each of its nodes,
    the more the less sure the draft was.

    A level's nodes are drawn without replacement, the chain goes on from the first one. How many
    of the others there are, is decided by the probability of the first, which was drawn before
    them: each is still a draw given the earlier ones.
    """

    goes_on_from = 1

    def __init__(self, depth: int, greedy: torch.Tensor):
        super().__init__((CATERPILLAR_WIDTHS[0][-1],) * depth, greedy)

    def noise_size(self, nodes):
        return self.sizes[0]

    def expand(self, q, noise):
        width = min(self.sizes[0], q.shape[-1])
        tokens, _ = draw(q[:, 0], noise[:, :width])
        tokens = torch.where(self.greedy[:, None], q[:, 0].topk(width, -1).indices, tokens)
        return Level(tokens, torch.zeros_like(tokens))


def caterpillar_widths(confidence: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """Nodes of a level int64 [R] by the probability ``confidence`` float32 [R] of its first one;
    ``greedy`` bool [R]."""
    column = sum((confidence <= edge).astype(np.int64) for edge in CATERPILLAR_CLASSES)
    return np.array(CATERPILLAR_WIDTHS)[np.where(greedy, 0, 1), column]


def draft_distribution(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None,
    top_p: torch.Tensor | None, candidates: int = 256,
) -> torch.Tensor:  # fmt: skip
    """q, float32 [R, w, V]: what a node's children are drawn from.

    ``logits`` float32 [R, w, V]; ``temperature`` float32 [R], 0 (greedy) reads as 1;
    ``top_k`` int64 [R], ``top_p`` float32 [R], None: no request truncates. Verification is
    lossless with any q; this one is close to what the target samples from. Truncation
    keeps at most ``candidates`` tokens: sorting a whole vocabulary costs more than it gains.
    """
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    q = (logits / scale).softmax(-1)
    if top_k is None and top_p is None:
        return q
    best, tokens = q.topk(min(candidates, q.shape[-1]), -1)
    rank = torch.arange(best.shape[-1], device=q.device)
    keep = torch.ones_like(best, dtype=torch.bool)
    truncated = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    if top_k is not None:
        keep &= rank < top_k[:, None, None]
        truncated |= top_k < q.shape[-1]
    if top_p is not None:
        # top_p's mass is that of what top_k left.
        mass = (best * keep).cumsum(-1) / (best * keep).sum(-1, keepdim=True)
        keep &= mass - best * keep / (best * keep).sum(-1, keepdim=True) < top_p[:, None, None]
        truncated |= top_p < 1
    narrow = torch.zeros_like(q).scatter_(-1, tokens, best * keep)
    narrow /= narrow.sum(-1, keepdim=True)
    return torch.where(truncated[:, None, None], narrow, q)
