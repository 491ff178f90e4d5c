"""Lossless verification of drafts that were drawn from a draft model.

``p`` is the target's distribution behind a verified row, ``q`` the draft's that the row's
children were drawn from. A rule decides which child becomes text, or that none does, such
that the output follows ``p`` exactly whatever ``q`` is, and accepts the more the closer
``q`` is:

* ``without_replacement`` (RSD, arXiv 2402.14160): siblings are tried in draw order; a
  rejected one is removed from ``p`` by ``(p - q)+`` and from ``q``. On a chain this is
  standard speculative sampling (arXiv 2211.17192).
* ``with_replacement`` (SpecInfer, arXiv 2305.09781): the same with ``q`` unchanged.
* ``k_seq`` (SpecTr, arXiv 2310.15141): i.i.d. siblings, tested alike with a common
  factor ``rho``.
* ``block`` (block verification, arXiv 2403.10444): a chain as a whole, from its end.
* ``traversal`` (traversal verification, arXiv 2505.12398): a tree as a whole, leaf by leaf.

Deterministic siblings, which no ``q`` proposed, come after the drawn ones and are accepted
with their probability under what is left of ``p``. Requests without drawn nodes go by that
alone.

Why a rule needs draw order, and nodes whose number does not depend on what was drawn: the
proof treats the j-th sibling as a draw from ``q`` given the earlier ones. Sorting siblings,
or keeping them for what they are, makes them draws from something else.

A rule's ``reference`` walks one request after another and touches only the rows that its walk
visits, with vector operations over the vocabulary. It also is what runs on the CPU, but for
chains (``chains.py``); on a GPU it would wait for the device at every node, so that
``kernels/tree_rules.py`` serves there. :meth:`SampledRule.verify` chooses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from vllm_specplus.samplers import chains
from vllm_specplus.samplers.probabilities import Probabilities, draw, padded
from vllm_specplus.samplers.relaxed_sampling import Relaxation, RelaxedSampling
from vllm_specplus.samplers.rules import Nodes, Rule
from vllm_specplus.step import DraftProbs, Rows

#: Bisection steps for SpecTr's rho: float64 knows no finer.
BISECTIONS = 50


class SampledRule(Rule):
    """Judges drawn nodes by what they were drawn from.

    Its ways to do so share their arguments: ``target_probs`` float32 [L, V]; the step's rows;
    ``draft_probs``; ``accept_noise`` float64 [L] and ``output_noise`` float64 [R], independent
    uniforms in [0, 1). They return the output along every accepted path, int32 [L], and -1 at
    rows off the path: a row on the path outputs the token of its accepted child or, the path's
    last row, a token of its own, so that ``tree.accepted_paths`` reads the path off the result.
    ValueError where a rule meets what it does not verify.
    """

    verifies = frozenset({Nodes.DRAWN, Nodes.DETERMINISTIC})
    lossless = True
    kernel: ClassVar[str]
    """Its launcher in ``kernels.tree_rules``."""
    vectorised_chains: ClassVar[bool] = False
    """Does ``chains.verify`` decide as this rule does where no row has a sibling?"""

    def verify(
        self, target_probs: torch.Tensor, rows: Rows, draft_probs: DraftProbs,
        accept_noise: torch.Tensor, output_noise: torch.Tensor,
        relaxation: Relaxation | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Judges a step in the fastest way there is for it: as :meth:`reference` does."""
        step = target_probs, rows, draft_probs, accept_noise, output_noise
        # The Triton kernels read a row's token unseen, and vLLM pads some drafts with -1.
        on_gpu = target_probs.device.type != "cpu" and not (rows.tokens < 0).any()
        if on_gpu and relaxation is None:
            return self.on_device(*step)
        vectorised = self.vectorised_chains or relaxation is not None
        if vectorised and chains.all_chains(rows):
            return chains.verify(*step, relaxation)
        return self.reference(*step, relaxation)

    def reference(
        self, target_probs: torch.Tensor, rows: Rows, draft_probs: DraftProbs,
        accept_noise: torch.Tensor, output_noise: torch.Tensor,
        relaxation: Relaxation | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Judges one request after another. With ``relaxation`` requests that allow it are
        verified by that, level by level."""
        out = np.full(len(rows.tokens), -1, np.int32)
        accept, output = accept_noise.double().tolist(), output_noise.double().tolist()
        stops: list[frozenset[int] | None] = [None] * (len(rows.starts) - 1)
        if relaxation is not None:
            stops = relaxation.stops
        has_draws = np.add.reduceat(draft_probs.drawn, rows.starts[:-1]) > 0
        self.check(rows, draft_probs, has_draws & [each is None for each in stops])
        for r, (first, end) in enumerate(pairwise(rows.starts.tolist())):
            tree, stop = Tree(target_probs, rows, draft_probs, accept, first, end), stops[r]
            if relaxation is not None and stop is not None:
                path, residual = _relaxed_walk(tree, relaxation, stop)
            elif has_draws[r]:
                path, residual = self.walk(tree)
            else:
                path, residual = _walk_levels(tree, None)
            for row, child in pairwise(path):
                out[row] = rows.tokens[child]
            out[path[-1]] = _draw(residual, tree.p(path[-1]), output[r])
        return torch.from_numpy(out).to(target_probs.device)

    def on_device(
        self, target_probs: torch.Tensor, rows: Rows, draft_probs: DraftProbs,
        accept_noise: torch.Tensor, output_noise: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Judges all requests at once without waiting for the device. ``target_probs`` and
        ``draft_probs.q`` may be views with strided rows; ``rows`` holds no padding."""
        from vllm_specplus.kernels import tree_rules  # Triton, which no CPU needs

        has_draws = np.add.reduceat(draft_probs.drawn, rows.starts[:-1]) > 0
        self.check(rows, draft_probs, has_draws)
        launch = getattr(tree_rules, self.kernel)
        return launch(target_probs, rows, draft_probs, accept_noise, output_noise)

    def warm_up(self, vocab_size: int, device: torch.device) -> None:
        """Compiles what :meth:`on_device` runs for a target of ``vocab_size`` tokens."""
        # The compiler's variants differ in whether a size is a multiple of 16; a draft's
        # vocabulary may be smaller than the target's.
        whole = vocab_size // 16 * 16
        other = vocab_size - 1 if whole == vocab_size else whole
        none = np.array([-1, -1, -1], np.int32)
        rows = Rows(
            tokens=np.zeros(3, np.int32),
            parents=np.array([-1, 0, -1], np.int32),
            starts=np.array([0, 2, 3], np.int32),
            depths=np.array([0, 1, 0], np.int32),
        )
        target_probs = torch.full((3, vocab_size), 1 / vocab_size, device=device)
        noise = torch.full((3,), 0.5, device=device)
        for size in (vocab_size, other):
            index, drawn = none.copy(), np.array([1, 0, 0], np.int32)
            index[0] = 0
            q = torch.full((1, max(size, 1)), 1 / max(size, 1), device=device)
            step = DraftProbs(q, index, drawn)
            self.on_device(target_probs, rows, step, noise, noise[:2].clone())

    def check(self, rows: Rows, draft_probs: DraftProbs, judged: np.ndarray) -> None:
        """Raises ValueError if the requests ``judged`` bool [R] hold what it does not verify."""

    @abstractmethod
    def walk(self, tree: Tree) -> tuple[list[int], torch.Tensor]:
        """Returns the accepted rows of a tree that has drawn nodes, its root's first, and the
        weights float32 [V] that the last token is drawn from (not normalised)."""


class Tree:
    """One request's rows; all row numbers are those of the step."""

    def __init__(
        self, target_probs: torch.Tensor, rows: Rows, draft_probs: DraftProbs,
        accept: list[float], first: int, end: int,
    ):  # fmt: skip
        self.root = first
        self.accept = accept
        self.tokens = rows.tokens
        self.children: dict[int, list[int]] = {row: [] for row in range(first, end)}
        for row in range(first + 1, end):
            if rows.tokens[row] >= 0:  # vLLM pads some drafts with -1: no tokens
                self.children[first + int(rows.parents[row])].append(row)
        self._target_probs, self._draft_probs = target_probs, draft_probs

    def drawn(self, row: int) -> int:
        """Counts the row's drawn children."""
        return int(self._draft_probs.drawn[row])

    def p(self, row: int) -> torch.Tensor:
        """Copies the target's distribution behind a row, float32 [V]."""
        return self._target_probs[row].clone()

    def q(self, row: int) -> torch.Tensor:
        """Copies float32 [V'] that the row's children were drawn from."""
        return self._draft_probs.q[int(self._draft_probs.index[row])].clone()


# -- rules that decide one level after another ----------------------------------------


class _LevelByLevel(SampledRule):
    def walk(self, tree):
        return _walk_levels(tree, self.choose)

    @abstractmethod
    def choose(
        self, tree: Tree, row: int, residual: torch.Tensor
    ) -> tuple[int | None, torch.Tensor]:
        """Returns the drawn child of ``row`` that is accepted, or None, and what a rejection
        leaves of ``residual`` float32 [V], the target's distribution there."""


def _walk_levels(
    tree: Tree, choose: Callable[..., tuple[int | None, torch.Tensor]] | None
) -> tuple[list[int], torch.Tensor]:
    """Walks as :meth:`SampledRule.walk` says; ``choose`` None: nothing was drawn."""
    path = [tree.root]
    while True:
        row = path[-1]
        residual, chosen, drawn = tree.p(row), None, tree.drawn(row)
        if choose is not None and drawn:
            chosen, residual = choose(tree, row, residual)
        if chosen is None:
            chosen = _deterministic(tree, tree.children[row][drawn:], residual)
        if chosen is None:
            return path, residual
        path.append(chosen)


class WithReplacement(_LevelByLevel):
    """Tries the drawn children in draw order (SpecInfer)."""

    name = "with_replacement"
    kernel = "walk_with_replacement"
    renormalises: ClassVar[bool] = False
    """Does a rejected child leave ``q``?"""

    def choose(self, tree, row, residual):
        q = tree.q(row)
        for child in tree.children[row][: tree.drawn(row)]:
            token = int(tree.tokens[child])
            q_x = float(q[token])
            if tree.accept[child] * q_x < float(residual[token]) and q_x > 0:
                return child, residual
            residual = _normalised(_excess(1.0, residual, q), residual)
            if self.renormalises:
                _remove(q, token)
        return None, residual


class WithoutReplacement(WithReplacement):
    """The same for siblings that differ (RSD); on chains, standard speculative sampling."""

    name = "without_replacement"
    kernel = "walk_without_replacement"
    renormalises = True
    vectorised_chains = True


class KSeq(_LevelByLevel):
    """Tests i.i.d. siblings alike, with the best rho (SpecTr)."""

    name = "k_seq"
    kernel = "walk_k_seq"

    def choose(self, tree, row, residual):
        p, q, children = residual, tree.q(row), tree.children[row][: tree.drawn(row)]
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
    """Finds SpecTr's rho* in [1, k]: 1 - (1 - beta)^k = rho beta, beta = sum min(q, p / rho)."""
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


# -- rules over whole trees --------------------------------------------------------------


class _WholeTree(SampledRule):
    verifies = frozenset({Nodes.DRAWN})

    def check(self, rows, draft_probs, judged):
        counts = np.diff(rows.starts)
        nodes = np.flatnonzero((rows.parents >= 0) & (rows.tokens >= 0))
        parents = np.repeat(rows.starts[:-1], counts)[nodes] + rows.parents[nodes]
        children = np.bincount(parents, minlength=len(rows.tokens))
        of_judged = np.repeat(judged, counts)
        if (children != draft_probs.drawn)[of_judged].any():
            raise ValueError(f"{self.name} verification takes no deterministic siblings")
        if self.chains_only and (children[of_judged] > 1).any():
            raise ValueError(f"{self.name} verification takes chains only")


class Block(_WholeTree):
    """Accepts the longest prefix of a chain whose own test passes."""

    name = "block"
    kernel = "verify_block"
    chains_only = True

    def walk(self, tree):
        chain = [tree.root]
        while tree.children[chain[-1]]:
            chain.append(tree.children[chain[-1]][0])
        reach, accepted = 1.0, 0
        residual = _excess(1.0, tree.p(tree.root), tree.q(tree.root))
        for i, row in enumerate(chain[1:], 1):
            above, token = chain[i - 1], int(tree.tokens[row])
            q_x = float(tree.q(above)[token])
            reach = min(reach * float(tree.p(above)[token]) / q_x, 1.0) if q_x > 0 else 0.0
            p = tree.p(row)
            if i == len(chain) - 1:
                passes, rest = reach, p
            else:
                rest = _excess(reach, p, tree.q(row))
                passes = _ratio(rest, reach)
            if tree.accept[row] < passes:
                accepted, residual = i, rest
        return chain[: accepted + 1], residual


class Traversal(_WholeTree):
    """Accepts the first leaf in depth-first draw order whose test passes; a rejected leaf is cut
    off, and its parent tries with what is left."""

    name = "traversal"
    kernel = "verify_traversal"

    def walk(self, tree):
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
                p_x, q_x = float(target[row][token]), float(draft[row][token])
                reach[child] = min(reach[row] * p_x / q_x, 1.0) if q_x else 0.0
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


# -- relaxed -----------------------------------------------------------------------------


def _relaxed_walk(
    tree: Tree, relaxation: Relaxation, stops: frozenset[int]
) -> tuple[list[int], torch.Tensor]:
    """Walks as :class:`WithoutReplacement` does, by the masses of a relaxed rule."""
    path, rule = [tree.root], relaxation.rule
    while True:
        row = path[-1]
        residual, chosen, drawn = tree.p(row), None, tree.drawn(row)
        q = padded(tree.q(row), len(residual)) if drawn else None
        for number, child in enumerate(tree.children[row]):
            drawn_from = q if number < drawn else None
            token = int(tree.tokens[child])
            p_x = float(residual[token])
            q_x = 1.0 if drawn_from is None else float(drawn_from[token])
            if q_x <= 0.0:
                continue
            exact = tree.accept[child] * q_x < p_x
            strict = token in stops
            if _accepts(rule, residual, drawn_from, token, tree.accept[child], strict):
                relaxation.relaxed += not exact
                chosen = child
                break
            if drawn_from is None:
                drawn_from = torch.zeros_like(residual)
                drawn_from[token] = 1.0
            tokens = torch.tensor([token], device=residual.device)
            is_drawn = torch.tensor([number < drawn], device=residual.device)
            rest = rule.residual(residual[None], drawn_from[None], is_drawn, tokens)[0]
            residual = _normalised(rest, residual)
            if number < drawn:
                _remove(q, token)
        if chosen is None:
            return path, residual
        path.append(chosen)


def _accepts(
    rule: RelaxedSampling, p: torch.Tensor, q: torch.Tensor | None, token: int, noise: float,
    strict: bool,
) -> bool:  # fmt: skip
    """Is ``token``, drawn from ``q`` [V] (None: not drawn), accepted under ``p`` [V]?"""
    target_mass, draft_mass = float(p[token]), 1.0 if q is None else float(q[token])
    if not strict and target_mass > 0.0:
        zero = torch.zeros(1, dtype=torch.int64, device=p.device)
        known = Probabilities(p[None], p.new_empty(0, len(p)) if q is None else q[None])
        draft_row = zero - 1 if q is None else zero
        target_mass, draft_mass = map(float, rule.masses(known, zero, draft_row, zero + token))
    return noise * draft_mass < target_mass


# -- parts --------------------------------------------------------------------------------


def _deterministic(tree: Tree, children: list[int], residual: torch.Tensor) -> int | None:
    """Chooses among deterministic children by their probability under ``residual``, from which
    it removes the rejected ones."""
    for child in children:
        token = int(tree.tokens[child])
        p_x = float(residual[token])
        residual[token] = 0.0
        total = float(residual.sum(dtype=torch.float64))
        if tree.accept[child] * (p_x + total) < p_x or total <= 0.0:
            return child
    return None


def _normalised(residual: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Divides by the sum. Where rounding leaves nothing, p and q are equal: ``p`` stays."""
    total = float(residual.sum(dtype=torch.float64))
    return residual / total if total > 0.0 else p


def _remove(q: torch.Tensor, token: int) -> None:
    """Makes ``q`` norm(q without ``token``), in place; all zero where nothing is left."""
    q[token] = 0.0
    total = float(q.sum(dtype=torch.float64))
    if total > 0.0:
        q /= total


def _excess(reach: float, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns (reach p - q)+."""
    p = p * reach
    p[: len(q)] -= q
    return p.clamp_(min=0.0)


def _ratio(excess: torch.Tensor, reach: float) -> float:
    """Returns R / (R + 1 - reach), R the sum of ``excess``."""
    total = float(excess.sum(dtype=torch.float64))
    return total / (total + 1.0 - reach) if total + 1.0 - reach > 0.0 else 1.0


def _draw(weights: torch.Tensor, p: torch.Tensor, noise: float) -> int:
    """Draws a token with probability proportional to ``weights``, or to ``p`` where rounding
    left nothing; never one of weight 0."""
    if not float(weights.sum(dtype=torch.float64)) > 0.0:
        weights = p
    return int(draw(weights[None], torch.tensor([noise], dtype=torch.float64, device=p.device)))
