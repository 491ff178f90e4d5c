"""Relaxed speculative sampling: a token may borrow probability from its like. **Lossy.**

Lossless verification accepts a token ``x``, drawn from the draft's ``q``, with probability
``min(1, p(x) / q(x))``. Codes of image models are interchangeable to a large part, so that
``p`` and ``q`` are flat and disagree on which of many like codes it is to be. These rules
compare the masses of something larger, ``min(1, P / Q)``:

* ``lantern`` (arXiv 2410.03355): ``P = p(x) + S``, ``S`` the mass of the nearest codes in the
  codebook, as many of the first k as stay within ``delta``; ``Q = q(x)``;
* ``lantern++`` (arXiv 2502.06352): the same within ``(lambda - 1) p(x)``;
* ``gsd`` (arXiv 2508.07747): ``P`` and ``Q`` of the tokens next to ``x`` by rank in ``p``, of
  nearly its probability (and, optionally, nearly its code);
* ``kl_judge`` (JuDi, arXiv 2601.04766): everything is accepted where ``KL(p || q)`` is small
  and the target is not sure.

A token that nothing drew has ``q = 1``. After a rejection the text goes on with
``norm((p - q f)+)``, ``f`` the acceptance probability, which is the best there is for any
``f`` (arXiv 2601.09212) and the lossless one for ``f >= min(1, p / q)``. With k = 0,
delta = 0, lambda = 1 or a group of 1 every rule is the lossless one, bit for bit.

A stop token is never accepted by relaxation, nor one that the target gives nothing (the
request's top-k or top-p cut it off), and greedy requests are verified losslessly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_specplus.config import (
        AcceptanceConfig,
        GsdAcceptance,
        KlJudgeAcceptance,
        LanternAcceptance,
        LanternPlusAcceptance,
    )

#: Rows of a codebook whose distances are held at a time.
CHUNK = 1024


def neighbours(codebook: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [V, k] the nearest other codes of each, nearest first, by L2 distance of
    ``codebook`` [V, d]. Ties go to the lower id."""
    codebook = codebook.float()
    k = min(k, len(codebook) - 1)
    found = []
    for begin in range(0, len(codebook), CHUNK):
        part = codebook[begin : begin + CHUNK]
        distance = torch.cdist(part, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(part), device=codebook.device)
        distance[own, begin + own] = torch.inf
        found.append(distance.sort(dim=-1, stable=True).indices[:, :k])
    return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Laws:
    """The distributions at hand."""

    p: torch.Tensor
    """float32 [L, V] of the target."""
    q: torch.Tensor
    """float32 [M, V] of the draft."""

    def of(self, law: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """q of each of ``tokens`` int64 [n, ...] by row ``law`` int64 [n, ...] of ``q``; 1 where
        it is negative: nothing drew the token."""
        if not len(self.q):
            return torch.ones(tokens.shape, device=tokens.device)
        return torch.where(law >= 0, self.q[law.clamp(min=0), tokens], 1.0)


class RelaxedRule(ABC):
    """Which masses decide on a token. Batched over n (row, token) pairs, on any device."""

    @abstractmethod
    def masses(
        self, laws: Laws, rows: torch.Tensor, law: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``P`` and ``Q`` float32 [n] of ``tokens`` int64 [n], each judged by row ``rows`` int64
        [n] of ``p`` and row ``law`` int64 [n] of ``q`` (-1: nothing drew it): accepted with
        probability ``min(1, P / Q)``."""

    def residual(
        self, p: torch.Tensor, q: torch.Tensor, drawn: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """What is left of ``p`` float32 [n, V] after ``tokens`` int64 [n] were rejected; not
        normalised. ``q`` float32 [n, V], all of it on the token where ``drawn`` bool [n] is not.

        Of a rule that accepts at least ``min(1, p / q)``.
        """
        return (p - q).clamp_(min=0.0)


class Lantern(RelaxedRule):
    """Both of them: the bound on what may be borrowed is what differs."""

    def __init__(self, config: LanternAcceptance | LanternPlusAcceptance, codebook: torch.Tensor):
        self.config = config
        self.near = neighbours(codebook, config.k)
        self._taken = neighbours(codebook, config.k + 1)  # one more, in the reference codes
        self._delta = getattr(config, "delta", None)
        self._lambda = getattr(config, "lambda_", None)

    def _lent(self, p: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, k + 1] mass of the nearest 0..k neighbours, 0 from where it exceeds the
        bound: a prefix lends, nearest first."""
        mine = p[rows, tokens][:, None]
        # Ids beyond the codes (labels of classes) have p = 0, and are not accepted.
        near = self.near[tokens.clamp(max=len(self.near) - 1)]
        mass = p[rows[:, None], near].cumsum(-1)
        bound = self._delta if self._delta is not None else (self._lambda - 1.0) * mine
        lent = torch.where(mass <= bound, mass, 0.0)
        return torch.cat((torch.zeros_like(mine), lent), -1)

    def masses(self, laws, rows, law, tokens):
        lent = self._lent(laws.p, rows, tokens).amax(-1)
        return laws.p[rows, tokens] + lent, laws.of(law, tokens)

    def residual(self, p, q, drawn, tokens):
        """Or the reference codes' rules, for parity: they take away all neighbours once one
        lends (``models/ea_model_llamagen.py``, ``ea_model_lumina_mgpt.py``)."""
        left = super().residual(p, q, drawn, tokens)
        if self.config.residual == "optimal":
            return left
        lends = (self._lent(p, torch.arange(len(p), device=p.device), tokens) > 0).any(-1)
        taken = self._taken[tokens.clamp(max=len(self._taken) - 1)]
        near = torch.zeros_like(p, dtype=torch.bool).scatter_(1, taken, True)
        if self.config.residual == "llamagen":
            theirs = torch.where(
                drawn[:, None], p - q.masked_fill(near, 0.0), left.masked_fill(near, 0.0)
            )
        else:
            theirs = p.masked_fill(near, 0.0) - q
        theirs = theirs.clamp_(min=0.0)
        # They go on with a uniform draw where nothing is left; p knows better.
        theirs = torch.where((theirs > 0).any(-1, keepdim=True), theirs, p)
        return torch.where(lends[:, None], theirs, left)


class Gsd(RelaxedRule):
    def __init__(self, config: GsdAcceptance, codebook: torch.Tensor):
        self.config = config
        self.codebook = codebook.float()
        # As many below as above in rank, and the odd one below, as in the reference code.
        below, above = config.group // 2, (config.group - 1) // 2
        self._offsets = torch.arange(-below, above + 1, device=codebook.device)

    def masses(self, laws, rows, law, tokens):
        p = laws.p[rows]
        order = p.argsort(dim=-1, stable=True)
        rank = (order == tokens[:, None]).int().argmax(-1)
        group, inside = self._groups(p, order, rank[:, None])
        group, inside = group[:, 0], inside[:, 0]
        mine = (p.gather(1, group) * inside).sum(-1)
        theirs = (laws.of(law[:, None].expand_as(group), group) * inside).sum(-1)
        return mine, torch.where(law >= 0, theirs, 1.0)

    def _groups(
        self, p: torch.Tensor, order: torch.Tensor, ranks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [n, r, G] around ``ranks`` int64 [n, r] of ``p`` [n, V], and which of them
        belong to the group; ``order`` int64 [n, V] sorts ``p``."""
        count, size = ranks.shape[1], len(self._offsets)
        places = ranks[..., None] + self._offsets
        inside = (places >= 0) & (places < p.shape[1])
        group = order.gather(1, places.clamp(0, p.shape[1] - 1).flatten(1))
        mass = p.gather(1, group).view(-1, count, size)
        group = group.view(-1, count, size)
        own = group[..., self.config.group // 2, None]
        gap = (mass - mass[..., self.config.group // 2, None]).abs()
        inside &= (mass > 0) & (gap < self.config.max_gap)
        if self.config.max_distance is not None:
            known = len(self.codebook) - 1  # ids beyond the codes have p = 0
            apart = self.codebook[group.clamp(max=known)] - self.codebook[own.clamp(max=known)]
            inside &= apart.square().sum(-1) < self.config.max_distance
        return group, inside | (self._offsets == 0)

    def residual(self, p, q, drawn, tokens):
        """In full: a group may accept less than the token alone would."""
        order = p.argsort(dim=-1, stable=True)
        ranks = torch.arange(p.shape[1], device=p.device).expand_as(p)
        group, inside = self._groups(p, order, ranks)
        by_rank = [
            (law.gather(1, group.flatten(1)).view_as(group) * inside).sum(-1) for law in (p, q)
        ]
        mine, theirs = (torch.empty_like(p).scatter_(1, order, mass) for mass in by_rank)
        spent = q * torch.where(mine >= theirs, 1.0, mine / theirs)
        # All of p is spent exactly where P / Q >= p / q; rounding must not leave dust there.
        left = torch.where(mine * q >= p * theirs, (p - q).clamp(min=0.0), p - spent)
        return left.clamp_(min=0.0)


class KlJudge(RelaxedRule):
    def __init__(self, config: KlJudgeAcceptance):
        self.config = config

    def masses(self, laws, rows, law, tokens):
        mine, theirs = laws.p[rows, tokens], laws.of(law, tokens)
        if not len(laws.q):
            return mine, theirs
        p, q = laws.p[rows], laws.q[law.clamp(min=0)]
        terms = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0)
        alike = (terms.sum(-1) <= self.config.threshold) & (p.amax(-1) <= self.config.sure)
        return torch.where(alike & (law >= 0), theirs, mine), theirs


def make_rule(config: AcceptanceConfig, codebook: torch.Tensor | None) -> RelaxedRule | None:
    """The rule, None for one of another kind; ``codebook`` float [V, d] of an image model."""
    if not config.compares:
        return None
    if config.rule == "kl_judge":
        return KlJudge(config)
    return (Gsd if config.rule == "gsd" else Lantern)(config, codebook)


@dataclass(slots=True)
class Relaxation:
    """A rule for the R requests of a step, and how often it mattered."""

    rule: RelaxedRule
    stops: list[frozenset[int] | None]
    """Stop tokens of each request; None: it is verified losslessly."""
    relaxed: int | torch.Tensor = 0
    """Tokens that the lossless rule would have rejected with the same uniforms."""
