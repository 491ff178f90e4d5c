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

A stop token is never accepted by relaxation, and greedy requests are verified losslessly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
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


class RelaxedRule(ABC):
    """Which masses decide on a token."""

    @abstractmethod
    def masses(
        self, p: torch.Tensor, q: torch.Tensor | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``P`` and ``Q`` float32 [n] of ``tokens`` int64 [n]: accepted with probability
        ``min(1, P / Q)``. ``p`` and ``q`` float32 [V]; None: nothing drew the tokens."""

    def residual(self, p: torch.Tensor, q: torch.Tensor | None, token: int) -> torch.Tensor:
        """What is left of ``p`` float32 [V] after ``token`` was rejected; not normalised.

        Of a rule that accepts at least ``min(1, p / q)``.
        """
        if q is None:
            left = p.clone()
            left[token] = 0.0
            return left
        return (p - q).clamp_(min=0.0)


class Lantern(RelaxedRule):
    """Both of them: the bound on what may be borrowed is what differs."""

    def __init__(self, config: LanternAcceptance | LanternPlusAcceptance, codebook: torch.Tensor):
        self.config = config
        self.near = neighbours(codebook, config.k)
        self._taken = neighbours(codebook, config.k + 1)  # one more, in the reference codes
        self._delta = getattr(config, "delta", None)
        self._lambda = getattr(config, "lambda_", None)

    def _borrowed(self, p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """bool [n, k] which neighbours lend: a prefix, nearest first."""
        mass = p[self.near[tokens]].cumsum(-1)
        bound = self._delta if self._delta is not None else (self._lambda - 1.0) * p[tokens, None]
        return mass <= bound

    def masses(self, p, q, tokens):
        lent = torch.where(self._borrowed(p, tokens), p[self.near[tokens]].cumsum(-1), 0.0)
        mine = p[tokens]
        if lent.shape[-1]:
            mine = mine + lent.amax(-1)
        return mine, torch.ones_like(mine) if q is None else q[tokens]

    def residual(self, p, q, token):
        """Or the reference codes' rules, for parity: they take away all neighbours once one
        lends (``models/ea_model_llamagen.py``, ``ea_model_lumina_mgpt.py``)."""
        which = self.config.residual
        index = torch.tensor([token], device=p.device)
        if which == "optimal" or not bool(self._borrowed(p, index).any()):
            return super().residual(p, q, token)
        near = self._taken[token]
        left = p.clone()
        if q is None:
            left[near] = 0.0
            left[token] = 0.0
        elif which == "llamagen":
            q = q.clone()
            q[near] = 0.0
            left = (p - q).clamp_(min=0.0)
        else:
            left[near] = 0.0
            left = (left - q).clamp_(min=0.0)
        # They go on with a uniform draw where nothing is left; p knows better.
        return left if bool(left.any()) else p


class Gsd(RelaxedRule):
    def __init__(self, config: GsdAcceptance, codebook: torch.Tensor):
        self.config = config
        self.codebook = codebook.float()
        # As many below as above in rank, and the odd one below, as in the reference code.
        below, above = config.group // 2, (config.group - 1) // 2
        self._offsets = torch.arange(-below, above + 1, device=codebook.device)

    def masses(self, p, q, tokens):
        order = p.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(p), device=p.device)
        places = rank[tokens, None] + self._offsets
        inside = (places >= 0) & (places < len(p))
        group = order[places.clamp(0, len(p) - 1)]
        mass = p[group]
        inside &= (mass > 0) & ((mass - p[tokens, None]).abs() < self.config.max_gap)
        if self.config.max_distance is not None:
            known = len(self.codebook) - 1  # ids beyond the codes have p = 0
            codes = self.codebook[group.clamp(max=known)]
            distance = (codes - self.codebook[tokens.clamp(max=known), None]).square().sum(-1)
            inside &= distance < self.config.max_distance
        inside |= self._offsets == 0
        theirs = torch.ones_like(mass[:, 0]) if q is None else (q[group] * inside).sum(-1)
        return (mass * inside).sum(-1), theirs

    def residual(self, p, q, token):
        """In full: a group may accept less than the token alone would."""
        if q is None:
            return super().residual(p, q, token)
        mine, theirs = self.masses(p, q, torch.arange(len(p), device=p.device))
        spent = q * torch.where(mine >= theirs, 1.0, mine / theirs)
        # P / Q >= p / q exactly where all of p is spent; rounding must not leave dust there.
        return torch.where(mine * q >= p * theirs, (p - q).clamp(min=0.0), p - spent).clamp_(min=0)


class KlJudge(RelaxedRule):
    def __init__(self, config: KlJudgeAcceptance):
        self.config = config

    def masses(self, p, q, tokens):
        mine = p[tokens]
        if q is None:
            return mine, torch.ones_like(mine)
        divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0).sum()
        alike = (divergence <= self.config.threshold) & (p.max() <= self.config.sure)
        return torch.where(alike, q[tokens], mine), q[tokens]


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
    relaxed: int = field(default=0)
    """Tokens that the lossless rule would have rejected with the same uniforms."""
