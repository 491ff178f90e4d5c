"""Verification of chains, all requests at once.

What ``sampled.WithoutReplacement.reference`` decides row by row (and with a relaxation), for
steps in which no node has a sibling: no loop, nothing waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.samplers.probabilities import Probabilities, draw, padded
from vllm_specplus.samplers.relaxed_sampling import Relaxation
from vllm_specplus.step import DraftProbs, Rows


def all_chains(rows: Rows) -> bool:
    """Says whether no row has a sibling."""
    in_request = np.arange(len(rows.parents)) - np.repeat(rows.starts[:-1], np.diff(rows.starts))
    return bool((rows.parents == in_request - 1).all())


def verify(
    target_probs: torch.Tensor, rows: Rows, draft_probs: DraftProbs, accept_noise: torch.Tensor,
    output_noise: torch.Tensor, relaxation: Relaxation | None = None,
) -> torch.Tensor:  # fmt: skip
    """Judges all requests as ``SampledRule.reference`` does: int32 [L] the output along every
    accepted path, -1 off it."""
    device, (count, vocab) = target_probs.device, target_probs.shape
    request = np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
    # Row by row: its token, the row of the draft's probabilities that it was drawn from, ...
    drawn_from = np.roll(np.where(draft_probs.drawn > 0, draft_probs.index, -1), 1)
    host = (rows.tokens, drawn_from, request, rows.depths, _strict(rows, request, relaxation))
    host = torch.from_numpy(np.stack(host).astype(np.int64))
    tokens, drawn_from, request, depth, strict = host.to(device)
    starts = torch.from_numpy(rows.starts.astype(np.int64)).to(device)
    root, node = depth == 0, (depth > 0) & (tokens >= 0)  # vLLM pads some drafts with -1
    tokens = torch.where(node, tokens, 0)  # what else is there may be no token of the rule
    above = (torch.arange(count, device=device) - 1).clamp(min=0)
    q = draft_probs.q
    known = Probabilities(
        target_probs, padded(q, vocab) if len(q) else target_probs.new_empty(0, vocab)
    )
    noise = accept_noise.double()
    p_x, q_x = target_probs[above, tokens], known.draft_mass(drawn_from, tokens)
    exact = accepted = noise * q_x.double() < p_x.double()
    if relaxation is not None:
        target_mass, draft_mass = relaxation.rule.masses(known, above, drawn_from, tokens)
        relaxed = noise * draft_mass.double() < target_mass.double()
        accepted = torch.where(strict.bool(), exact, relaxed & (p_x > 0))
    # One line per request: is the chain accepted up to here?
    width = int(rows.depths.max()) + 1
    line = torch.zeros(len(starts) - 1, width, dtype=torch.bool, device=device)
    line[request, depth] = root | (node & accepted & (q_x > 0))
    reached = line.int().cumprod(-1)
    last = starts[:-1] + reached.sum(-1) - 1
    # What the last output is drawn from: all of p after a chain that was accepted to its end.
    residual, child = target_probs[last], (last + 1).clamp(max=count - 1)
    rejects = (last + 1 < starts[1:]) & node[child]
    rest = _residual(residual, known, drawn_from[child], tokens[child], relaxation)
    # Where rounding leaves nothing, p and q are equal: p stays.
    residual = torch.where(rejects[:, None] & (rest > 0).any(-1, keepdim=True), rest, residual)
    on_path = reached[request, depth].bool()
    out = torch.full((count,), -1, dtype=torch.int32, device=device)
    # A node on the path is the output of the row above it.
    out[:-1] = torch.where(on_path & node, tokens, -1)[1:].int()
    out[last] = draw(residual, output_noise).int()
    if relaxation is not None:
        relaxation.relaxed = relaxation.relaxed + (on_path & node & ~exact).sum()
    return out


def _strict(rows: Rows, request: np.ndarray, relaxation: Relaxation | None) -> np.ndarray:
    """Says which rows, bool [L], the lossless rule judges; ``request`` int [L] whose they are."""
    if relaxation is None:
        return np.ones(len(request), bool)
    strict = np.array([stops is None for stops in relaxation.stops])[request]
    for r, stops in enumerate(relaxation.stops):
        if stops:
            strict |= (request == r) & np.isin(rows.tokens, list(stops))
    return strict


def _residual(
    p: torch.Tensor, known: Probabilities, drawn_from: torch.Tensor, tokens: torch.Tensor,
    relaxation: Relaxation | None,
) -> torch.Tensor:  # fmt: skip
    """Returns what is left of ``p`` float32 [R, V] where ``tokens`` int64 [R], drawn from row
    ``drawn_from`` int64 [R] of ``known.draft`` (-1: not drawn), were rejected; not normalised."""
    drawn = drawn_from >= 0
    q = torch.zeros_like(p).scatter_(1, tokens[:, None], 1.0)
    if len(known.draft):
        q = torch.where(drawn[:, None], known.draft[drawn_from.clamp(min=0)], q)
    lossless = (p - q).clamp(min=0.0)
    if relaxation is None:
        return lossless
    strict = torch.tensor([stops is None for stops in relaxation.stops], device=p.device)
    return torch.where(strict[:, None], lossless, relaxation.rule.residual(p, q, drawn, tokens))
