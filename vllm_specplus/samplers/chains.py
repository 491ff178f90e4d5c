"""Verification of chains, all requests at once.

What ``sampled.verify`` decides row by row with rule ``without_replacement`` (and with a
relaxation), for steps in which no node has a sibling: no loop, nothing waits for the device.
``sampled.py`` is the reference.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.samplers.interchangeable import Laws, Relaxation
from vllm_specplus.samplers.sampled import draw, padded
from vllm_specplus.step import DraftProbs, Rows


def all_chains(rows: Rows) -> bool:
    """Has no row a sibling?"""
    in_request = np.arange(len(rows.parents)) - np.repeat(rows.starts[:-1], np.diff(rows.starts))
    return bool((rows.parents == in_request - 1).all())


def verify(
    p: torch.Tensor, rows: Rows, laws: DraftProbs, accept_noise: torch.Tensor,
    output_noise: torch.Tensor, relaxation: Relaxation | None = None,
) -> torch.Tensor:  # fmt: skip
    """As ``sampled.verify``: the output along every accepted path, int32 [L], -1 off it."""
    device, (count, vocab) = p.device, p.shape
    request = np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
    # Row by row: its token, the law it was drawn from, and whether the lossless rule judges it.
    law = np.where(laws.drawn > 0, laws.index, -1)
    host = (rows.tokens, np.roll(law, 1), request, rows.depths, _strict(rows, request, relaxation))
    tokens, law, request, place, strict = torch.from_numpy(np.stack(host).astype(np.int64)).to(
        device
    )
    starts = torch.from_numpy(rows.starts.astype(np.int64)).to(device)
    root, node = place == 0, (place > 0) & (tokens >= 0)  # vLLM pads some drafts with -1
    tokens = torch.where(node, tokens, 0)  # what else is there may be no token of the rule
    above = (torch.arange(count, device=device) - 1).clamp(min=0)
    known = Laws(p, padded(laws.q, vocab) if len(laws.q) else p.new_empty(0, vocab))
    noise = accept_noise.double()
    mine, theirs = p[above, tokens], known.of(law, tokens)
    exact = accepted = noise * theirs.double() < mine.double()
    if relaxation is not None:
        borrowed, shared = relaxation.rule.masses(known, above, law, tokens)
        relaxed = noise * shared.double() < borrowed.double()
        accepted = torch.where(strict.bool(), exact, relaxed & (mine > 0))
    # One line per request: is the chain accepted up to here?
    width = int(rows.depths.max()) + 1
    line = torch.zeros(len(starts) - 1, width, dtype=torch.bool, device=device)
    line[request, place] = root | (node & accepted & (theirs > 0))
    reached = line.int().cumprod(-1)
    last = starts[:-1] + reached.sum(-1) - 1
    # What the last output is drawn from: all of p after a chain that was accepted to its end.
    left, child = p[last], (last + 1).clamp(max=count - 1)
    rejects = (last + 1 < starts[1:]) & node[child]
    rest = _residual(left, known, law[child], tokens[child], relaxation)
    # Where rounding leaves nothing, p and q are equal: p stays.
    left = torch.where(rejects[:, None] & (rest > 0).any(-1, keepdim=True), rest, left)
    on_path = reached[request, place].bool()
    out = torch.full((count,), -1, dtype=torch.int32, device=device)
    # A node on the path is the output of the row above it.
    out[:-1] = torch.where(on_path & node, tokens, -1)[1:].int()
    out[last] = draw(left, output_noise).int()
    if relaxation is not None:
        relaxation.relaxed = relaxation.relaxed + (on_path & node & ~exact).sum()
    return out


def _strict(rows: Rows, request: np.ndarray, relaxation: Relaxation | None) -> np.ndarray:
    """bool [L] rows that the lossless rule judges; ``request`` int [L] whose they are."""
    if relaxation is None:
        return np.ones(len(request), bool)
    strict = np.array([stops is None for stops in relaxation.stops])[request]
    for r, stops in enumerate(relaxation.stops):
        if stops:
            strict |= (request == r) & np.isin(rows.tokens, list(stops))
    return strict


def _residual(
    p: torch.Tensor, known: Laws, law: torch.Tensor, tokens: torch.Tensor,
    relaxation: Relaxation | None,
) -> torch.Tensor:  # fmt: skip
    """What is left of ``p`` float32 [R, V] where ``tokens`` int64 [R], drawn from row ``law``
    int64 [R] of ``known.q`` (-1: not drawn), were rejected; not normalised."""
    drawn = law >= 0
    q = torch.zeros_like(p).scatter_(1, tokens[:, None], 1.0)
    if len(known.q):
        q = torch.where(drawn[:, None], known.q[law.clamp(min=0)], q)
    left = (p - q).clamp(min=0.0)
    if relaxation is None:
        return left
    strict = torch.tensor([stops is None for stops in relaxation.stops], device=p.device)
    return torch.where(strict[:, None], left, relaxation.rule.residual(p, q, drawn, tokens))
