"""Verification of chains, all requests at once.

What ``sampled.verify`` decides row by row with rule ``without_replacement`` (and with a
relaxation), for steps in which no node has a sibling: no loop, nothing waits for the device.
``sampled.py`` is the reference.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.samplers.base import Rows
from vllm_specplus.samplers.interchangeable import Laws, Relaxation
from vllm_specplus.samplers.sampled import DraftLaws


def all_chains(rows: Rows) -> bool:
    """Has no row a sibling?"""
    in_request = np.arange(len(rows.parents)) - np.repeat(rows.starts[:-1], np.diff(rows.starts))
    return bool((rows.parents == in_request - 1).all())


def verify(
    p: torch.Tensor, rows: Rows, laws: DraftLaws, accept_noise: torch.Tensor,
    output_noise: torch.Tensor, relaxation: Relaxation | None = None,
) -> torch.Tensor:  # fmt: skip
    """As ``sampled.verify``: the output along every accepted path, int32 [L], -1 off it."""
    device, vocab = p.device, p.shape[1]
    counts = np.diff(rows.starts)
    # vLLM pads some drafts with -1: no tokens, and the chain ends before them.
    nodes = np.flatnonzero((rows.parents >= 0) & (rows.tokens >= 0))
    above = nodes - 1
    law = np.where(laws.drawn[above] > 0, laws.index[above], -1)
    host = np.stack((nodes, law, rows.tokens[nodes], _strict(rows, nodes, relaxation)))
    nodes_on, law_on, tokens, strict = torch.from_numpy(host.astype(np.int64)).to(device)
    known = Laws(p, torch.nn.functional.pad(laws.q, (0, vocab - laws.q.shape[1])))
    if not len(laws.q):
        known = Laws(p, p.new_empty(0, vocab))
    noise = accept_noise[nodes_on].double()
    mine, theirs = p[nodes_on - 1, tokens], known.of(law_on, tokens)
    exact = noise * theirs.double() < mine.double()
    accepted = exact
    if relaxation is not None:
        borrowed, shared = relaxation.rule.masses(known, nodes_on - 1, law_on, tokens)
        relaxed = noise * shared.double() < borrowed.double()
        accepted = torch.where(strict.bool(), exact, relaxed)
    accepted = accepted & (theirs > 0)
    # One line per request: is the chain accepted up to here?
    width = int(counts.max())
    line = torch.zeros(len(counts), width, dtype=torch.bool, device=device)
    line[:, 0] = True
    request = np.repeat(np.arange(len(counts)), counts)
    place = np.stack((request[nodes], nodes - rows.starts[request[nodes]]))
    place_on = torch.from_numpy(place.astype(np.int64)).to(device)
    line[place_on[0], place_on[1]] = accepted
    reached = line.int().cumprod(-1)
    length = reached.sum(-1)
    starts = torch.from_numpy(rows.starts.astype(np.int64)).to(device)
    last = starts[:-1] + length - 1
    left = p[last]
    if len(nodes):
        left = _left(left, last, starts, rows, laws, known, relaxation)
    cdf = left.cumsum(-1, dtype=torch.float64)
    point = output_noise.double()[:, None] * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, point, right=True)[:, 0]
    out = torch.full((len(rows.tokens),), -1, dtype=torch.int32, device=device)
    on_path = reached[place_on[0], place_on[1]].bool()
    # A node on the path is the output of the row above it.
    out[nodes_on - 1] = torch.where(on_path, tokens, -1).int()
    out[last] = drawn.int()
    if relaxation is not None:
        relaxation.relaxed = relaxation.relaxed + (on_path & ~exact).sum()
    return out


def _strict(rows: Rows, nodes: np.ndarray, relaxation: Relaxation | None) -> np.ndarray:
    """bool [N] nodes that the lossless rule judges."""
    if relaxation is None:
        return np.ones(len(nodes), bool)
    request = np.searchsorted(rows.starts, nodes, side="right") - 1
    strict = np.array([stops is None for stops in relaxation.stops])[request]
    for r, stops in enumerate(relaxation.stops):
        if stops:
            strict |= (request == r) & np.isin(rows.tokens[nodes], list(stops))
    return strict


def _left(
    p: torch.Tensor, last: torch.Tensor, starts: torch.Tensor, rows: Rows, laws: DraftLaws,
    known: Laws, relaxation: Relaxation | None,
) -> torch.Tensor:  # fmt: skip
    """What each request's last output is drawn from, float32 [R, V]; ``p`` [R, V] of its last
    row: all of it after a chain that was accepted to its end."""
    device = p.device
    rejects = last + 1 < starts[1:]
    child = (last + 1).clamp(max=len(rows.tokens) - 1)
    tokens = torch.from_numpy(rows.tokens.astype(np.int64)).to(device)[child]
    rejects &= tokens >= 0
    tokens = tokens.clamp(min=0)
    index = torch.from_numpy(np.where(laws.drawn > 0, laws.index, -1).astype(np.int64))
    law = index.to(device)[last]
    drawn = law >= 0
    q = torch.zeros_like(p).scatter_(1, tokens[:, None], 1.0)
    if len(known.q):
        q = torch.where(drawn[:, None], known.q[law.clamp(min=0)], q)
    left = (p - q).clamp(min=0.0)
    if relaxation is not None:
        strict = torch.tensor([stops is None for stops in relaxation.stops], device=device)
        relaxed = relaxation.rule.residual(p, q, drawn, tokens)
        left = torch.where(strict[:, None], left, relaxed)
    # Where rounding leaves nothing, p and q are equal: p stays.
    return torch.where(rejects[:, None] & (left > 0).any(-1, keepdim=True), left, p)
