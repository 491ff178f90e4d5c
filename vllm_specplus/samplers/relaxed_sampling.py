"""Relaxed speculative sampling: a token may borrow probability from similar ones. **Lossy.**

Lossless verification accepts a token ``x``, drawn from the draft's ``q``, with probability
``min(1, p(x) / q(x))``. Codes of image models can replace each other to a large part, so that
``p`` and ``q`` are flat and disagree on which of many similar codes it is to be. These rules
compare the masses of something larger, ``min(1, P / Q)``:

* ``lantern`` (arXiv 2410.03355): ``P = p(x) + S``, ``S`` the mass of the nearest codes in the
  codebook, as many of the first k as stay within ``delta``; ``Q = q(x)``;
* ``lantern++`` (arXiv 2502.06352): the same within ``(lambda - 1) p(x)``;
* ``gsd`` (arXiv 2508.07747): ``P`` and ``Q`` of the tokens next to ``x`` by rank in ``p``, of
  nearly its probability (and, optionally, close to it as vectors);
* ``kl_judge`` (JuDi, arXiv 2601.04766): everything is accepted where ``KL(p || q)`` is small
  and the target is not sure.

A deterministic token has ``q = 1``. After a rejection the text goes on with
``norm((p - q f)+)``, ``f`` the acceptance probability, which is the best there is for any
``f`` (arXiv 2601.09212) and the lossless one for ``f >= min(1, p / q)``. With k = 0,
delta = 0, lambda = 1 or a group of 1 every rule is the lossless one, bit for bit.

A stop token is never accepted by relaxation, nor one that the target gives nothing (the
request's top-k or top-p cut it off). The walk over a tree is the one of
``sampled.WithoutReplacement``, with these masses for its own. Greedy requests are verified
losslessly, but for those of ``lantern`` with ``greedy``, whose nodes are judged by
:meth:`Lantern.most_probable`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_specplus.samplers.probabilities import Probabilities
from vllm_specplus.samplers.rules import Nodes, Rule

#: Rows of a codebook whose distances are held at a time.
CHUNK = 1024


def neighbours(codebook: torch.Tensor, k: int) -> torch.Tensor:
    """Finds the nearest other codes of each, int64 [V, k], nearest first, by L2 distance of
    ``codebook`` [V, d]. Ties go to the lower id."""
    codebook = codebook.float()
    k = min(k, len(codebook) - 1)
    found = []
    for begin in range(0, len(codebook), CHUNK):
        part = codebook[begin : begin + CHUNK]
        distance = torch.cdist(part, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(part), device=codebook.device)
        distance[own, begin + own] = torch.inf
        found.append(_least(distance, k))
    return torch.cat(found)


def _least(values: torch.Tensor, k: int) -> torch.Tensor:
    """Finds the k least of each row of ``values`` [n, V], int64 [n, k], least first and ties to the
    lower id, without sorting whole rows."""
    least, ids = values.topk(k, largest=False)
    ids = ids.sort(dim=-1).values
    found = ids.gather(1, values.gather(1, ids).sort(dim=-1, stable=True).indices)
    if k:  # which of those that tie for the last place were found is chance
        tied = (values <= least[:, -1:]).sum(-1) > k
        found[tied] = values[tied].sort(dim=-1, stable=True).indices[:, :k]
    return found


class RelaxedSampling(Rule):
    """Says which masses decide on a token. Batched over n (row, token) pairs, on any device."""

    verifies = frozenset({Nodes.DETERMINISTIC, Nodes.DRAWN})

    @abstractmethod
    def masses(
        self, known: Probabilities, rows: torch.Tensor, draft_rows: torch.Tensor,
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Returns ``P`` and ``Q`` float32 [n] of ``tokens`` int64 [n], each judged by row
        ``rows`` int64 [n] of ``known.target`` and row ``draft_rows`` int64 [n] of
        ``known.draft`` (-1: it is deterministic): accepted with probability
        ``min(1, P / Q)``."""

    @abstractmethod
    def reference(self, p: list[float], q: list[float] | None, token: int) -> tuple[float, float]:
        """Returns the :meth:`masses` of one token of ``p`` and ``q`` [V] (None: it is
        deterministic)."""

    def residual(
        self, p: torch.Tensor, q: torch.Tensor, drawn: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Returns what is left of ``p`` float32 [n, V] after ``tokens`` int64 [n] were rejected;
        not normalised. ``q`` float32 [n, V] is all on the token where ``drawn`` bool [n] is not.

        Of a rule that accepts at least ``min(1, p / q)``.
        """
        return (p - q).clamp_(min=0.0)


class Lantern(RelaxedSampling):
    """Lets image codes borrow from their ``k`` nearest neighbours, at most ``delta`` (LANTERN)."""

    name = "lantern"
    needs = ("codebook",)
    greedy: bool
    """Does it serve greedy requests, too, by :meth:`most_probable`?"""

    def __init__(
        self, *, k: int, delta: float, residual: Literal["optimal", "llamagen", "lumina"],
        codebook: torch.Tensor, greedy: bool = False,
    ):  # fmt: skip
        self._delta, self.greedy = delta, greedy
        self._find_neighbours(k, residual, codebook)

    def _find_neighbours(self, k: int, residual: str, codebook: torch.Tensor) -> None:
        self._residual = residual
        # In the reference codes' residuals one more is taken away than may lend.
        self._taken = neighbours(codebook, k if residual == "optimal" else k + 1)
        self.near = self._taken[:, :k]

    def _bound(self, p_x):
        """Returns the most that a token of probability ``p_x``, or [n, 1], may borrow."""
        return self._delta

    def _lent(self, p: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the mass of the nearest 0..k neighbours, float32 [n, k + 1], 0 from where it
        exceeds the bound: a prefix lends, nearest first."""
        p_x = p[rows, tokens][:, None]
        # Ids beyond the codes (labels of classes) have p = 0, and are not accepted.
        near = self.near[tokens.clamp(max=len(self.near) - 1)]
        mass = p[rows[:, None], near].cumsum(-1)
        lent = torch.where(mass <= self._bound(p_x), mass, 0.0)
        return torch.cat((torch.zeros_like(p_x), lent), -1)

    def masses(self, known, rows, draft_rows, tokens):
        lent = self._lent(known.target, rows, tokens).amax(-1)
        return known.target[rows, tokens] + lent, known.draft_mass(draft_rows, tokens)

    def most_probable(
        self, p: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Says, bool [n], which of ``tokens`` int64 [n] are, with what they borrow, at least as
        probable as the most probable of their row ``rows`` int64 [n] of ``p`` float32 [L, V]."""
        own = p[rows, tokens]
        lent = self._lent(p, rows, tokens).amax(-1)
        return (own > 0) & (own + lent >= p.amax(-1)[rows])

    def reference(self, p, q, token):
        lent = total = 0.0
        for code in self.near[min(token, len(self.near) - 1)].tolist():
            total += p[code]
            if total <= self._bound(p[token]):
                lent = total
        return p[token] + lent, 1.0 if q is None else q[token]

    def residual(self, p, q, drawn, tokens):
        """Or the reference codes' rules, for parity: they take away all neighbours once one
        lends (``models/ea_model_llamagen.py``, ``ea_model_lumina_mgpt.py``)."""
        optimal = super().residual(p, q, drawn, tokens)
        if self._residual == "optimal":
            return optimal
        lends = (self._lent(p, torch.arange(len(p), device=p.device), tokens) > 0).any(-1)
        taken = self._taken[tokens.clamp(max=len(self._taken) - 1)]
        near = torch.zeros_like(p, dtype=torch.bool).scatter_(1, taken, True)
        if self._residual == "llamagen":
            published = torch.where(
                drawn[:, None], p - q.masked_fill(near, 0.0), optimal.masked_fill(near, 0.0)
            )
        else:
            published = p.masked_fill(near, 0.0) - q
        published = published.clamp_(min=0.0)
        # They go on with a uniform draw where nothing is left; p knows better.
        published = torch.where((published > 0).any(-1, keepdim=True), published, p)
        return torch.where(lends[:, None], published, optimal)


class LanternPlus(Lantern):
    """The same, in proportion to the code's own probability (LANTERN++)."""

    name = "lantern++"

    def __init__(
        self, *, k: int, lambda_: float, residual: Literal["optimal", "llamagen", "lumina"],
        codebook: torch.Tensor, greedy: bool = False,
    ):  # fmt: skip
        self._lambda, self.greedy = lambda_, greedy
        self._find_neighbours(k, residual, codebook)

    def _bound(self, p_x):
        return (self._lambda - 1.0) * p_x


class Closeness:
    """Which of C codes are closer to each other than a given distance, a bit for each pair."""

    def __init__(self, vectors: torch.Tensor, most: float):
        """``vectors`` [C, d]; ``most``: squared L2 distance, which closer codes are below."""
        vectors = vectors.float()
        length, bits = vectors.square().sum(-1), []
        places = 2 ** torch.arange(8, device=vectors.device)
        for begin in range(0, len(vectors), CHUNK):
            here = slice(begin, begin + CHUNK)
            distance = length[here, None] + length - 2 * vectors[here] @ vectors.T
            close = torch.nn.functional.pad(distance < most, (0, -len(vectors) % 8))
            bits.append((close.unflatten(1, (-1, 8)) * places).sum(-1).to(torch.uint8))
        self._bits = torch.cat(bits)

    def __call__(self, codes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Says of pairs of int64 tensors that broadcast, bool. Ids beyond the codes, which have no
        probability, count as the last one."""
        codes, others = (ids.clamp(max=len(self._bits) - 1) for ids in (codes, others))
        return (self._bits[codes, others >> 3] >> (others & 7) & 1).bool()


def by_rank(p: torch.Tensor) -> torch.Tensor:
    """Orders the tokens of each row of ``p`` float32 [n, V] that have a probability, int64 [n, m],
    the least first and of equals the lower id; shorter rows have others before them."""
    most = max(int((p > 0).sum(-1).max()), 1) if len(p) else 1
    ids = p.topk(most).indices.sort(dim=-1).values
    return ids.gather(1, p.gather(1, ids).argsort(dim=-1, stable=True))


class Gsd(RelaxedSampling):
    """Judges image codes as groups of neighbours in rank (Grouped Speculative Decoding)."""

    name = "gsd"
    needs = ("codebook", "embeddings")

    def __init__(
        self, *, group: int, max_gap: float, max_distance: float | None,
        vectors: Literal["embeddings", "codebook"], residual: Literal["optimal", "published"],
        codebook: torch.Tensor, embeddings: Callable[[], torch.Tensor],
    ):  # fmt: skip
        """``embeddings`` returns the target's input embeddings of all codes, [codes, hidden]."""
        self._group, self._max_gap, self._residual = group, max_gap, residual
        self._close = None
        if max_distance is not None:
            compared = embeddings() if vectors == "embeddings" else codebook
            self._close = Closeness(compared, max_distance)
        # As many below as above in rank, and the odd one below, as in the reference code.
        below, above = group // 2, (group - 1) // 2
        self._offsets = torch.arange(-below, above + 1, device=codebook.device)

    def masses(self, known, rows, draft_rows, tokens):
        p = known.target[rows]
        order = by_rank(p)
        own = order == tokens[:, None]
        group, inside = self._groups(p, order, own.int().argmax(-1, keepdim=True))
        # A token that is not there has no probability, and no group.
        group, inside = group[:, 0], inside[:, 0] & own.any(-1, keepdim=True)
        target_mass = (p.gather(1, group) * inside).sum(-1)
        q = known.draft_mass(draft_rows[:, None].expand_as(group), group)
        return target_mass, torch.where(draft_rows >= 0, (q * inside).sum(-1), 1.0)

    def reference(self, p, q, token):
        order = sorted(range(len(p)), key=lambda x: (p[x], x))
        rank = order.index(token)
        target_mass, draft_mass = p[token], 1.0 if q is None else q[token]
        for offset in self._offsets.tolist():
            if offset == 0 or not 0 <= rank + offset < len(p):
                continue
            other = order[rank + offset]
            if p[other] == 0 or abs(p[other] - p[token]) >= self._max_gap:
                continue
            if self._close and not self._close(torch.tensor(token), torch.tensor(other)):
                continue
            target_mass += p[other]
            draft_mass += 0.0 if q is None else q[other]
        return target_mass, draft_mass

    def _groups(
        self, p: torch.Tensor, order: torch.Tensor, ranks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tokens int64 [n, r, G] around ``ranks`` int64 [n, r] of ``p`` [n, V], and
        which of them belong to the group; ``order`` int64 [n, m] is :func:`by_rank`."""
        count, size = ranks.shape[1], len(self._offsets)
        around = ranks[..., None] + self._offsets
        inside = (around >= 0) & (around < order.shape[1])
        group = order.gather(1, around.clamp(0, order.shape[1] - 1).flatten(1))
        mass = p.gather(1, group).view(-1, count, size)
        group = group.view(-1, count, size)
        own = group[..., self._group // 2, None]
        gap = (mass - mass[..., self._group // 2, None]).abs()
        inside &= (mass > 0) & (gap < self._max_gap)
        if self._close is not None:
            inside &= self._close(own, group)
        return group, inside | (self._offsets == 0)

    def residual(self, p, q, drawn, tokens):
        """In full, since a group may accept less than the token alone would; or, for parity, the
        reference code's, which is per token (its ``jacobi_iteration_lumina_mgpt.py``)."""
        if self._residual == "published":
            return super().residual(p, q, drawn, tokens)
        # Of other tokens than these nothing is left: they have no probability.
        order = by_rank(p)
        ranks = torch.arange(order.shape[1], device=p.device).expand_as(order)
        group, inside = self._groups(p, order, ranks)
        target_mass, draft_mass = (
            (each.gather(1, group.flatten(1)).view_as(group) * inside).sum(-1) for each in (p, q)
        )
        p_x, q_x = p.gather(1, order), q.gather(1, order)
        spent = q_x * torch.where(target_mass >= draft_mass, 1.0, target_mass / draft_mass)
        # All of p is spent exactly where P / Q >= p / q; rounding must not leave dust there.
        exhausted = target_mass * q_x >= p_x * draft_mass
        left = torch.where(exhausted, (p_x - q_x).clamp(min=0.0), p_x - spent).clamp_(min=0.0)
        return torch.zeros_like(p).scatter_(1, order, left)


class KlJudge(RelaxedSampling):
    """Accepts drawn nodes where draft and target hardly differ and the target is not sure."""

    name = "kl_judge"
    verifies = frozenset({Nodes.DRAWN})

    def __init__(self, *, threshold: float, sure: float):
        self._threshold, self._sure = threshold, sure

    def masses(self, known, rows, draft_rows, tokens):
        p_x, q_x = known.target[rows, tokens], known.draft_mass(draft_rows, tokens)
        if not len(known.draft):
            return p_x, q_x
        p, q = known.target[rows], known.draft[draft_rows.clamp(min=0)]
        terms = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0)
        alike = (terms.sum(-1) <= self._threshold) & (p.amax(-1) <= self._sure)
        return torch.where(alike & (draft_rows >= 0), q_x, p_x), q_x

    def reference(self, p, q, token):
        if q is None:
            return p[token], 1.0
        pairs = zip(p, q, strict=True)
        kl = sum(p_x * math.log(p_x / max(q_x, 1e-30)) for p_x, q_x in pairs if p_x > 0)
        alike = kl <= self._threshold and max(p) <= self._sure
        return q[token] if alike else p[token], q[token]


@dataclass(slots=True)
class Relaxation:
    """A rule for the R requests of a step, and how often it mattered."""

    rule: RelaxedSampling
    stops: list[frozenset[int] | None]
    """Stop tokens of each request; None: it is verified losslessly."""
    relaxed: int | torch.Tensor = 0
    """Tokens that the lossless rule would have rejected with the same uniforms."""
