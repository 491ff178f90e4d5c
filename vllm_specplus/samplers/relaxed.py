"""Relaxed acceptance: nodes become text that the target did not draw. **Lossy.**

A rule only adds to what the lossless one accepts. Where a node holds the token that the
target drew, it is followed; where none does, the most probable node that the rule accepts is
taken instead of the draw:

* ``typical`` (Medusa, arXiv 2401.10774, section 2.3.1): ``p(x) > min(epsilon, delta exp(-H(p)))``;
* ``top_k_margin``: among the k most probable, and ``log p(x) >= log max p - margin``;
* ``judge`` (Judge Decoding, arXiv 2501.19309): a head on the target's hidden state at the node
  scores it above a threshold (``judge.py``).

``p`` is the target's distribution at the request's temperature (1 for greedy requests), and
nothing is accepted that the request's own top-k or top-p cut off. A stop token is never
accepted by relaxation, and never passed over. Text then no longer follows the target's
distribution; ``docs/acceptance.md`` has what that costs and brings.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vllm_specplus.samplers.judge import JudgeHead
from vllm_specplus.samplers.rules import Nodes, Rule
from vllm_specplus.step import Rows

#: Nodes whose ranks are counted at a time: bounds the copies of distributions.
CHUNK = 64


@dataclass(slots=True)
class CandidateStatistics:
    """The N nodes of a step as the target sees them; host arrays."""

    rows: np.ndarray
    """int64 [N] row of each node."""
    probability: np.ndarray
    """float32 [N] p(x)."""
    rank: np.ndarray
    """int64 [N] tokens more probable than x."""
    mass_above: np.ndarray
    """float32 [N] their probability."""
    best: np.ndarray
    """float32 [N] max p."""
    entropy: np.ndarray
    """float32 [N] H(p), nats."""
    score: np.ndarray | None = None
    """float32 [N] a judge's, of the node's own row."""


def candidate_statistics(
    logits: torch.Tensor, rows: Rows, temperature: np.ndarray, scores: torch.Tensor | None = None
) -> CandidateStatistics:
    """Computes what the rules need to know, in one copy from the device.

    ``logits`` [L, V]; ``temperature`` float32 [R], 0 for greedy requests; ``scores`` float32 [L]:
    a judge's.
    """
    nodes = np.flatnonzero(rows.parents >= 0)
    request = np.searchsorted(rows.starts, nodes, side="right") - 1
    above, node_of = np.unique(rows.starts[request] + rows.parents[nodes], return_inverse=True)
    scale = temperature[np.searchsorted(rows.starts, above, side="right") - 1]

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(logits.device)

    logarithms = logits[put(above)].float()
    logarithms /= put(np.where(scale > 0, scale, 1).astype(np.float32))[:, None]
    logarithms = logarithms.log_softmax(-1)
    p = logarithms.exp()
    # 0 log 0 = 0
    entropy = -(p * logarithms.clamp(min=-1e9)).sum(-1)
    parent, token = put(node_of), put(rows.tokens[nodes].clip(min=0).astype(np.int64))
    probability = p[parent, token]
    rank, mass = [], []
    for begin in range(0, len(nodes), CHUNK):
        here = slice(begin, begin + CHUNK)
        target_probs = p[parent[here]]
        more = target_probs > probability[here, None]
        rank.append(more.sum(-1).float())
        mass.append((target_probs * more).sum(-1))
    columns = [
        probability, torch.cat(rank), torch.cat(mass), p.max(-1).values[parent], entropy[parent]
    ]  # fmt: skip
    if scores is not None:
        columns.append(scores[put(nodes)])
    probability, rank, mass, best, entropy, *score = torch.stack(columns).cpu().numpy()
    return CandidateStatistics(
        nodes, probability, rank.astype(np.int64), mass, best, entropy, *score
    )


class SubstitutionRule(Rule):
    """Says which nodes may take the place of the target's draw."""

    verifies = frozenset({Nodes.DETERMINISTIC})
    head: JudgeHead | None = None
    """Scores nodes by their hidden states, if the rule goes by that."""

    @abstractmethod
    def accepts(self, statistics: CandidateStatistics) -> np.ndarray:
        """Returns bool [N]."""

    @abstractmethod
    def reference(self, target_probs: np.ndarray, token: int, score: float | None) -> bool:
        """Decides on one node, ``token`` of ``target_probs`` float64 [V]; ``score`` is its
        judge's."""


class Typical(SubstitutionRule):
    """Accepts nodes that are probable enough, the less the more open the text is (Medusa)."""

    name = "typical"

    def __init__(self, *, epsilon: float, delta: float):
        self._epsilon, self._delta = epsilon, delta

    def accepts(self, statistics):
        threshold = np.minimum(self._epsilon, self._delta * np.exp(-statistics.entropy))
        return statistics.probability > threshold

    def reference(self, target_probs, token, score):
        entropy = -sum(p * np.log(p) for p in target_probs if p > 0)
        return target_probs[token] > min(self._epsilon, self._delta * np.exp(-entropy))


class TopKMargin(SubstitutionRule):
    """Accepts nodes among the most probable tokens, and nearly as probable as the best."""

    name = "top_k_margin"

    def __init__(self, *, top_k: int, margin: float):
        self._top_k, self._margin = top_k, margin

    def accepts(self, statistics):
        enough = statistics.best * np.exp(-self._margin)
        return (statistics.rank < self._top_k) & (statistics.probability >= enough)

    def reference(self, target_probs, token, score):
        p_x = target_probs[token]
        rank = sum(p > p_x for p in target_probs)
        return rank < self._top_k and p_x >= max(target_probs) * np.exp(-self._margin)


class Judge(SubstitutionRule):
    """Accepts nodes that a trained head calls valid (Judge Decoding)."""

    name = "judge"
    needs = ("device",)

    def __init__(self, *, head: str, threshold: float | None, device: torch.device):
        self.head = JudgeHead(head, device)
        self._threshold = self.head.threshold if threshold is None else threshold

    def accepts(self, statistics):
        return statistics.score > self._threshold

    def reference(self, target_probs, token, score):
        return score > self._threshold


class Candidates(Protocol):
    """What :func:`substitute` reads of N nodes, as :class:`CandidateStatistics` has it."""

    rows: np.ndarray
    probability: np.ndarray


def substitute(
    rows: Rows, sampled: np.ndarray, statistics: Candidates, accepted: np.ndarray,
    stops: list[frozenset[int] | None],
) -> tuple[np.ndarray, int]:  # fmt: skip
    """Puts accepted nodes in the place of some of the target's draws; returns the result, int32
    [L], and how many it put.

    ``sampled`` int32 [L]; ``accepted`` bool [N] what the rule says; ``stops`` [R] stop tokens
    of each request, None for one that is verified losslessly.
    """
    out, relaxed = sampled.copy(), 0
    likely = np.zeros(len(sampled), np.float32)
    likely[statistics.rows[accepted]] = statistics.probability[accepted]
    for r, stop in enumerate(stops):
        if stop is None:
            continue
        first, end = int(rows.starts[r]), int(rows.starts[r + 1])
        row: int | None = first
        while row is not None:
            children = row + 1 + np.flatnonzero(rows.parents[row + 1 : end] == row - first)
            drawn = int(sampled[row])
            right = children[rows.tokens[children] == drawn]
            chosen = int(right[0]) if len(right) else None
            if chosen is None and drawn not in stop:
                others = [i for i in children if likely[i] > 0 and int(rows.tokens[i]) not in stop]
                if others:
                    chosen = int(max(others, key=lambda i: likely[i]))
                    out[row] = rows.tokens[chosen]
                    relaxed += 1
            row = chosen
    return out, relaxed
