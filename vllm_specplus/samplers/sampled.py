"""Lossless verification of drafts that were drawn from a draft model.

``p`` is the target's distribution behind a verified row, ``q`` the draft's that the row's
children were drawn from. A rule decides which child becomes text, or that none does, such
that the output follows ``p`` exactly whatever ``q`` is, and accepts the more the closer
``q`` is. Letters as in the literature survey of this project:

* ``without_replacement`` (C, RSD, arXiv 2402.14160): siblings are tried in draw order; a
  rejected one is removed from ``p`` by ``(p - q)+`` and from ``q``. On a chain this is the
  standard rule (A, arXiv 2211.17192).
* ``with_replacement`` (B, SpecInfer, arXiv 2305.09781): the same with ``q`` unchanged.
* ``k_seq`` (F, SpecTr, arXiv 2310.15141): i.i.d. siblings, tested alike with a common
  factor ``rho``.
* ``block`` (I, arXiv 2403.10444): a chain as a whole, from its end.
* ``traversal`` (J, arXiv 2505.12398): a tree as a whole, leaf by leaf.

Deterministic siblings, which no ``q`` proposed, come after the drawn ones and are accepted
with their probability under what is left of ``p`` (rule E). Requests without drawn nodes
go by that alone (rule D).

Why a rule needs draw order, and nodes whose number does not depend on what was drawn: the
proof treats the j-th sibling as a draw from ``q`` given the earlier ones. Sorting siblings,
or keeping them for what they are, makes them draws from something else.

Only the rows that the walk visits are touched, with vector operations over the vocabulary.
This is the reference, and what runs on the CPU; on a GPU it would wait for the device at
every node, so that ``kernels/tree_rules.py`` serves there.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from vllm_specplus.samplers.interchangeable import Laws, Relaxation, RelaxedRule
from vllm_specplus.step import DraftProbs, Rows

Rule = Literal["without_replacement", "with_replacement", "k_seq", "block", "traversal"]

#: Bisection steps for SpecTr's rho: float64 knows no finer.
BISECTIONS = 50


def verify(
    rule: Rule, p: torch.Tensor, rows: Rows, laws: DraftProbs,
    accept_noise: torch.Tensor, output_noise: torch.Tensor, relaxation: Relaxation | None = None,
) -> torch.Tensor:  # fmt: skip
    """The output along every accepted path, int32 [L]; -1 at rows off the path.

    ``p`` float32 [L, V]; ``accept_noise`` float32 [L], ``output_noise`` float32 [R]:
    independent uniforms in [0, 1). A row on the path outputs the token of its accepted
    child or, the path's last row, a token of its own: ``tree.accepted_paths`` reads the
    path off the result. With ``relaxation`` requests that allow it are verified by that, level
    by level. ValueError where a rule over whole trees meets what it does not
    know: deterministic siblings or, for ``block``, more than a chain.
    """
    out = np.full(len(rows.tokens), -1, np.int32)
    accept, output = accept_noise.double().tolist(), output_noise.double().tolist()
    for r in range(len(rows.starts) - 1):
        first, end = int(rows.starts[r]), int(rows.starts[r + 1])
        tree = _Tree(p, rows, laws, accept, first, end)
        if relaxation is not None and relaxation.stops[r] is not None:
            path, left = _relaxed_walk(tree, relaxation, relaxation.stops[r])
        elif not laws.drawn[first:end].any():
            path, left = _walk(tree, "without_replacement")
        elif rule == "block":
            tree.check_for(rule)
            path, left = _block(tree)
        elif rule == "traversal":
            tree.check_for(rule)
            path, left = _traverse(tree)
        else:
            path, left = _walk(tree, rule)
        for row, child in pairwise(path):
            out[row] = rows.tokens[child]
        out[path[-1]] = _draw(left, tree.p(path[-1]), output[r])
    return torch.from_numpy(out).to(p.device)


class _Tree:
    """One request's rows; all row numbers are those of the step."""

    def __init__(self, p, rows: Rows, laws: DraftProbs, accept: list[float], first: int, end: int):
        self.root = first
        self.accept = accept
        self.tokens = rows.tokens
        self.children: dict[int, list[int]] = {row: [] for row in range(first, end)}
        for row in range(first + 1, end):
            if rows.tokens[row] >= 0:  # vLLM pads some drafts with -1: no tokens
                self.children[first + int(rows.parents[row])].append(row)
        self._p, self._laws = p, laws

    def check_for(self, rule: Rule) -> None:
        """ValueError if a rule over whole trees cannot take this one."""
        counts = {row: len(children) for row, children in self.children.items()}
        if any(count != self.drawn(row) for row, count in counts.items()):
            raise ValueError(f"{rule} verification takes no deterministic siblings")
        if rule == "block" and max(counts.values()) > 1:
            raise ValueError("block verification takes chains only")

    def drawn(self, row: int) -> int:
        return int(self._laws.drawn[row])

    def p(self, row: int) -> torch.Tensor:
        """A copy of float32 [V]."""
        return self._p[row].clone()

    def q(self, row: int) -> torch.Tensor:
        """A copy of float32 [V'] that the row's children were drawn from."""
        return self._laws.q[int(self._laws.index[row])].clone()


def _walk(tree: _Tree, rule: Rule) -> tuple[list[int], torch.Tensor]:
    """Rules A to F, level by level: the accepted rows, and what the last token is drawn from
    (not normalised)."""
    path = [tree.root]
    while True:
        row = path[-1]
        left, chosen, drawn = tree.p(row), None, tree.drawn(row)
        if drawn and rule == "k_seq":
            chosen, left = _k_seq(tree, row, left)
        elif drawn:
            chosen, left = _one_by_one(tree, row, left, renormalise=rule == "without_replacement")
        if chosen is None:
            chosen = _deterministic(tree, tree.children[row][drawn:], left)
        if chosen is None:
            return path, left
        path.append(chosen)


def _one_by_one(
    tree: _Tree, row: int, left: torch.Tensor, renormalise: bool
) -> tuple[int | None, torch.Tensor]:
    """Rules B and C: try the drawn children in draw order."""
    q = tree.q(row)
    for child in tree.children[row][: tree.drawn(row)]:
        token = int(tree.tokens[child])
        mine = float(q[token])
        if tree.accept[child] * mine < float(left[token]) and mine > 0:
            return child, left
        left = _residual(left, q)
        if renormalise:
            _remove(q, token)
    return None, left


def _relaxed_walk(
    tree: _Tree, relaxation: Relaxation, stops: frozenset[int]
) -> tuple[list[int], torch.Tensor]:
    """Like :func:`_walk` without replacement, by the masses of a relaxed rule."""
    path, rule = [tree.root], relaxation.rule
    while True:
        row = path[-1]
        left, chosen, drawn = tree.p(row), None, tree.drawn(row)
        q = padded(tree.q(row), len(left)) if drawn else None
        for number, child in enumerate(tree.children[row]):
            law = q if number < drawn else None
            token = int(tree.tokens[child])
            mine, theirs = float(left[token]), 1.0 if law is None else float(law[token])
            if theirs <= 0.0:
                continue
            exact = tree.accept[child] * theirs < mine
            if _accepts(rule, left, law, token, tree.accept[child], token in stops):
                relaxation.relaxed += not exact
                chosen = child
                break
            if law is None:
                law = torch.zeros_like(left)
                law[token] = 1.0
            at = torch.tensor([token], device=left.device)
            is_drawn = torch.tensor([number < drawn], device=left.device)
            left = _normalised(rule.residual(left[None], law[None], is_drawn, at)[0], left)
            if number < drawn:
                _remove(q, token)
        if chosen is None:
            return path, left
        path.append(chosen)


def _accepts(
    rule: RelaxedRule, p: torch.Tensor, q: torch.Tensor | None, token: int, noise: float,
    strict: bool,
) -> bool:  # fmt: skip
    """Is ``token``, drawn from ``q`` [V] (None: not drawn), accepted under ``p`` [V]?"""
    mine, theirs = float(p[token]), 1.0 if q is None else float(q[token])
    if not strict and mine > 0.0:
        zero = torch.zeros(1, dtype=torch.int64, device=p.device)
        laws = Laws(p[None], p.new_empty(0, len(p)) if q is None else q[None])
        law = zero - 1 if q is None else zero
        mine, theirs = map(float, rule.masses(laws, zero, law, zero + token))
    return noise * theirs < mine


def padded(q: torch.Tensor, size: int) -> torch.Tensor:
    """``q`` [..., V'] with zeros up to ``size``."""
    return torch.nn.functional.pad(q, (0, size - q.shape[-1]))


def _residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """norm((p - q)+). Where rounding leaves nothing, p and q are equal: p stays."""
    return _normalised(_excess(1.0, p, q), p)


def _normalised(left: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    total = float(left.sum(dtype=torch.float64))
    return left / total if total > 0.0 else p


def _remove(q: torch.Tensor, token: int) -> None:
    """norm(q without ``token``), in place; all zero where nothing is left."""
    q[token] = 0.0
    total = float(q.sum(dtype=torch.float64))
    if total > 0.0:
        q /= total


def _deterministic(tree: _Tree, children: list[int], left: torch.Tensor) -> int | None:
    """Rule D on what is left, which it changes."""
    for child in children:
        token = int(tree.tokens[child])
        mine = float(left[token])
        left[token] = 0.0
        total = float(left.sum(dtype=torch.float64))
        if tree.accept[child] * (mine + total) < mine or total <= 0.0:
            return child
    return None


def _k_seq(tree: _Tree, row: int, p: torch.Tensor) -> tuple[int | None, torch.Tensor]:
    """Rule F, with the best rho."""
    q, children = tree.q(row), tree.children[row][: tree.drawn(row)]
    known = p[: len(q)]
    rho = best_rho(known, q, len(children))
    firsts: dict[int, int] = {}
    for child in children:
        token = int(tree.tokens[child])
        first = firsts.setdefault(token, child)
        if tree.accept[child] * rho * float(q[token]) < float(p[token]):
            return first, p  # the one that has descendants
    common = torch.minimum(q, known / rho)
    beta = float(common.sum(dtype=torch.float64))
    accepted = 1.0 - (1.0 - beta) ** len(children)
    return None, _excess(1.0, p, common * (accepted / beta if beta > 0.0 else 0.0))


def best_rho(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    """SpecTr's rho* in [1, k]: 1 - (1 - beta)^k = rho beta, beta = sum min(q, p / rho)."""
    low, high = 1.0, float(k)
    p, q = p.double(), q.double()
    for _ in range(BISECTIONS if k > 1 else 0):
        rho = (low + high) / 2
        beta = float(torch.minimum(q, p / rho).sum())
        if 1.0 - (1.0 - beta) ** k <= rho * beta:
            high = rho
        else:
            low = rho
    return high


def _block(tree: _Tree) -> tuple[list[int], torch.Tensor]:
    """Rule I: the longest prefix whose own test passes."""
    chain = [tree.root]
    while tree.children[chain[-1]]:
        chain.append(tree.children[chain[-1]][0])
    reach, accepted = 1.0, 0
    left = _excess(1.0, tree.p(tree.root), tree.q(tree.root))
    for i, row in enumerate(chain[1:], 1):
        above, token = chain[i - 1], int(tree.tokens[row])
        mine = float(tree.q(above)[token])
        reach = min(reach * float(tree.p(above)[token]) / mine, 1.0) if mine > 0 else 0.0
        p = tree.p(row)
        if i == len(chain) - 1:
            passes, rest = reach, p
        else:
            rest = _excess(reach, p, tree.q(row))
            passes = _ratio(rest, reach)
        if tree.accept[row] < passes:
            accepted, left = i, rest
    return chain[: accepted + 1], left


def _traverse(tree: _Tree) -> tuple[list[int], torch.Tensor]:
    """Rule J: the first leaf in depth-first draw order whose test passes; a rejected leaf is
    cut off, and its parent tries with what is left."""
    alive = {row: list(children) for row, children in tree.children.items()}
    target, draft, reach = {}, {}, {tree.root: 1.0}
    path = [tree.root]
    while True:
        row = path[-1]
        if row not in target:
            target[row] = tree.p(row)
            if alive[row]:
                draft[row] = tree.q(row)
        if alive[row]:
            child = alive[row][0]
            token = int(tree.tokens[child])
            mine = float(draft[row][token])
            reach[child] = min(reach[row] * float(target[row][token]) / mine, 1.0) if mine else 0.0
            path.append(child)
        elif len(path) == 1 or tree.accept[row] < reach[row]:
            return path, target[row]
        else:
            path.pop()
            parent, token = path[-1], int(tree.tokens[row])
            alive[parent].pop(0)
            rest = _excess(reach[parent], target[parent], draft[parent])
            reach[parent] = _ratio(rest, reach[parent])
            total = float(rest.sum(dtype=torch.float64))
            if total > 0.0:
                target[parent] = rest / total
            _remove(draft[parent], token)


def _excess(reach: float, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(reach p - q)+"""
    p = p * reach
    p[: len(q)] -= q
    return p.clamp_(min=0.0)


def _ratio(excess: torch.Tensor, reach: float) -> float:
    """R / (R + 1 - reach)"""
    total = float(excess.sum(dtype=torch.float64))
    return total / (total + 1.0 - reach) if total + 1.0 - reach > 0.0 else 1.0


def draw(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A token int64 [n] of each row of ``weights`` float [n, V], with probability proportional
    to them, by uniform ``noise`` [n] in [0, 1); never one of weight 0."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    # Below the total, so that the first token to exceed it exists, and has weight.
    return torch.searchsorted(cdf, noise.double()[:, None] * cdf[:, -1:], right=True)[:, 0]


def _draw(weights: torch.Tensor, p: torch.Tensor, noise: float) -> int:
    """A token with probability proportional to ``weights``, or to ``p`` where rounding left
    nothing; never one of weight 0."""
    if not float(weights.sum(dtype=torch.float64)) > 0.0:
        weights = p
    return int(draw(weights[None], torch.tensor([noise], dtype=torch.float64, device=p.device)))
