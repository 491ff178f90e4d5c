r"""Judging a drafted latent, and what replaces a rejected one (CSpD, arXiv 2411.11925).

Draft q and target p denoise a position with the same noise ``w = (x_T, eps_T .. eps_2)``. Given
w, either's latent is a Gaussian with known mean and sigma, that of its own last step. A
drafted ``x`` is accepted with probability ``min(1, R)``::

    R = S p(x | w) / q(x | w),    else  x ~ (S p - q)+ / Z

* ``exact``, the default: S = 1. This is speculative sampling of ``p(. | w)`` from
  ``q(. | w)``, hence lossless given w; w has the same distribution under both models, hence the
  output is the target's, for *any* number of steps.
* ``paper``: S is the ratio of the sigmas on the way (section 4.1),
  ``prod_{t >= 2} sigma_t^q / sigma_t^p``. It depends on w alone, so it tilts the output
  given w, and is exact only where it is 1: for one step, or equal sigmas.
* ``reference``: what the released code does, for comparison. S is inverted, and
  differences are divided by 42 sigma in R (not in the residual), which is what makes it
  accept. Its draft sits on its own mean; ours is drawn.

``p - q`` is drawn from by rejection: proposals from p, of which the share TV(p, q) is taken.
A latent needs one proposal on average, rejections included, and no network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vllm_specplus.image.continuous.chain import RESIDUAL, Chain, random_stream

Rule = Literal["exact", "paper", "reference"]
#: The released code's ``inner_temperature``.
FLATTENING = 42.0
#: Proposals drawn at once for a rejected latent, and how often.
PROPOSALS, ROUNDS = 64, 64


def log_weight(draft: Chain, target: Chain, rule: Rule) -> torch.Tensor:
    """log S, float32 [n]."""
    if rule == "exact":
        return torch.zeros_like(target.path_log_sigma)
    sign = 1 if rule == "paper" else -1
    return sign * (draft.path_log_sigma - target.path_log_sigma)


def log_ratio(draft: Chain, target: Chain, rule: Rule = "exact") -> torch.Tensor:
    """log R of the drafts' samples, float32 [n]. Their products over channels would leave the
    range of any float: everything is in logs."""
    x = draft.sample
    if rule == "reference":
        draft, target = _flattened(draft), _flattened(target)
    return log_weight(draft, target, rule) + target.log_density(x) - draft.log_density(x)


def _flattened(chain: Chain) -> Chain:
    wide = chain.log_sigma + math.log(FLATTENING)
    return Chain(chain.sample, chain.mean, wide, chain.path_log_sigma)


@dataclass(frozen=True, slots=True)
class Residual:
    """What replaces n rejected latents."""

    sample: torch.Tensor
    """float32 [n, d]"""
    proposals: torch.Tensor
    """int64 [n] looked at."""
    given_up: torch.Tensor
    """bool [n]: none of them was taken, and the last one stands. It is a draw of p: with TV
    the distance of p and q, this happens with probability ``TV (1 - TV)^4096``, which is below
    1e-4 for any TV and biases the output by less."""


@torch.inference_mode()
def residual(
    draft: Chain, target: Chain, streams: list[np.random.Generator], rule: Rule = "exact"
) -> Residual:
    """A latent of ``(S p - q)+`` for each of n positions, from a stream of random numbers
    of its own, so that it does not depend on the batch."""
    count, size = target.mean.shape
    device = target.mean.device
    sample = torch.empty((count, size), device=device)
    looked = torch.zeros(count, dtype=torch.long, device=device)
    open_ = torch.arange(count, device=device)
    weight = log_weight(draft, target, rule)
    for _ in range(ROUNDS):
        if not len(open_):
            break
        own = [streams[i] for i in open_.tolist()]
        normals = [each.standard_normal((PROPOSALS, size), np.float32) for each in own]
        uniforms = [each.random(PROPOSALS, np.float32) for each in own]
        normal, uniform = (torch.from_numpy(np.stack(x, 1)) for x in (normals, uniforms))
        p, q = target[open_], draft[open_]
        x = p.mean + p.log_sigma.exp() * normal.to(device)  # [PROPOSALS, n, d]
        # 1 - q / (S p) is what is taken of x; negative where q is the larger.
        excess = -torch.expm1(q.log_density(x) - p.log_density(x) - weight[open_])
        taken = uniform.to(device) < excess
        found = taken.any(0)
        first = torch.where(found, taken.int().argmax(0), PROPOSALS - 1)
        sample[open_] = x[first, torch.arange(len(open_), device=device)]
        looked[open_] += first + 1
        open_ = open_[~found]
    given_up = torch.zeros(count, dtype=torch.bool, device=device)
    given_up[open_] = True
    return Residual(sample, looked, given_up)


def streams_of(seeds: Sequence[int], positions: Sequence[int]) -> list[np.random.Generator]:
    """For :func:`residual`: of pictures' seeds and positions alone."""
    pairs = zip(seeds, positions, strict=True)
    return [random_stream(seed, RESIDUAL + position) for seed, position in pairs]


@dataclass(frozen=True, slots=True)
class Verdict:
    """On the windows of P pictures."""

    accepted: torch.Tensor
    """int64 [P] drafts before the first rejected one."""
    latent: torch.Tensor
    """float32 [P, d] what stands behind them: what replaces the rejected one, or, where none
    was, the target's own."""
    rejected: torch.Tensor
    """bool [P]"""
    proposals: torch.Tensor
    """int64 [P] of the residual; 0 where nothing was rejected."""
    given_up: torch.Tensor
    """bool [P]"""


@torch.inference_mode()
def judge(
    drafts: Chain, chains: Chain, uniforms: torch.Tensor, room: torch.Tensor,
    seeds: Sequence[int], positions: torch.Tensor, rule: Rule = "exact",
) -> Verdict:  # fmt: skip
    """Windows of ``room`` int64 [P] drafted latents, picture by picture.

    ``drafts`` has ``sum(room)`` rows. ``chains``, the target's, and ``uniforms`` have
    ``sum(room + 1)``: those of the drafted positions, and of the one behind them. ``positions``
    int64 [P] of a window's first; they and the pictures' seeds decide how residuals are drawn.
    """
    first = (room + 1).cumsum(0) - room - 1
    drafted = torch.ones(len(uniforms), dtype=torch.bool, device=room.device)
    drafted[first + room] = False
    taken = torch.zeros_like(drafted)
    taken[drafted] = uniforms[drafted].log() < log_ratio(drafts, chains[drafted], rule)
    # The row behind a window is never taken: it ends every search.
    refused = (~taken).nonzero()[:, 0]
    row = refused[torch.searchsorted(refused, first)]
    accepted = row - first
    latent = chains.sample[row]
    proposals, rejected = torch.zeros_like(room), accepted < room
    given_up = torch.zeros_like(rejected)
    if len(wrong := rejected.nonzero()[:, 0]):
        streams = streams_of(
            [seeds[p] for p in wrong.tolist()], (positions + accepted)[wrong].tolist()
        )
        draft_row = (room.cumsum(0) - room + accepted)[wrong]
        instead = residual(drafts[draft_row], chains[row[wrong]], streams, rule)
        latent[wrong] = instead.sample
        proposals[wrong], given_up[wrong] = instead.proposals, instead.given_up
    return Verdict(accepted, latent, rejected, proposals, given_up)
